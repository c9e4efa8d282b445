"""The columns of a source that is read after another one: those that were read there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from raybert.data.sources.documents import column_names
from raybert.data.sources.settings import SourceConfig

#: The settings of a source that name its columns.
COLUMNS = frozenset({"text_column", "label_column", "pair_column"})
#: What a model remembers of its source: how to read texts and labels like those.
REMEMBERED = COLUMNS | {"label_separator"}

S = TypeVar("S", bound=SourceConfig)


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
