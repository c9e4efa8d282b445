"""The columns of a source: by their usual names, or those that were read before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from raybert.data.sources.documents import column_names
from raybert.data.sources.settings import SourceConfig

#: The settings of a source that name its columns.
COLUMNS = frozenset({"text_column", "label_column", "pair_column"})
#: What a model remembers of its source: how to read texts and labels like those.
REMEMBERED = COLUMNS | {"label_separator"}

#: Usual names of two text columns, of words and of their tags.
_PAIRS = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "answer"),
    ("query", "document"),
    ("query", "passage"),
)
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags")

S = TypeVar("S", bound=SourceConfig)


def with_usual_columns(config: SourceConfig) -> tuple[SourceConfig, list[str]]:
    """Fill in columns with usual names; return what was found, for the user."""
    present = column_names(config)
    update: dict[str, str] = {}
    if config.pair_column is None:
        for first, second in _PAIRS:
            is_first = config.text_column == first or config.text_column not in present
            if is_first and {first, second} <= set(present):
                update = {"text_column": first, "pair_column": second}
                break
    if not update and config.text_column not in present:
        words = next((name for name in _WORDS if name in present), None)
        update = {} if words is None else {"text_column": words}
    if config.label_column == "label" and "label" not in present:
        tags = next((name for name in _TAGS if name in present), None)
        update |= {} if tags is None else {"label_column": tags}
    found = [f"{key}={column}" for key, column in update.items()]
    return config.model_copy(update=update), found


def with_columns_of(config: S, columns: Mapping[str, Any]) -> S:
    """A source that reads the columns that were read before, where it names no others.

    A column that is named, also by its default name, is read where the source has it; a default
    one also where the source lacks the one that was read before.
    """
    update = {}
    present: frozenset[str] | None = None
    for name in sorted(REMEMBERED & columns.keys()):
        given, before = getattr(config, name), columns[name]
        if given != type(config).model_fields[name].default or before == given or before is None:
            continue
        if name in COLUMNS:
            present = frozenset(column_names(config)) if present is None else present
            is_named = name in config.model_fields_set or not _has(present, before)
            if is_named and _has(present, given):
                continue
        update[name] = before
    return config.model_copy(update=update) if update else config


def _has(present: frozenset[str], columns: Any) -> bool:
    names = columns if isinstance(columns, list) else [columns]
    return present.issuperset(names)
