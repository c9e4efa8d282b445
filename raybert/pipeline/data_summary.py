"""What a user's file holds: its columns, which of them are texts and labels, and statistics."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from raybert.data.keyed import text_hash
from raybert.data.scripts import share_without_spaces
from raybert.data.sources import documents
from raybert.data.sources.cells import is_present
from raybert.data.sources.columns import with_usual_columns
from raybert.data.sources.labels import spell
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError, UserError
from raybert.pipeline.predict_stage import is_id
from raybert.tasks.labelled import resolve_source
from raybert.tasks.protocol import TextTask

_COLUMN_ROWS = 1000  # by which columns are told apart
_MOST_ROWS = 200_000  # that are counted
_SCRIPT_CHARS = 2_000_000  # by which scripts are found
_MANY_LABELS = 50  # values of a column of classes, at most, unless its name says that it is one
_COPIES = 5  # rows of each class, at least, on average
#: Usual names, the likeliest first. A column named so is taken before any other.
_TEXTS = "text body content message review comment sentence description document tweet title"
_LABELS = (
    "label labels class category target sentiment rating stars score tag tags topic intent queue "
    "department type priority status"
)
_SHOWN_CHARS = 40
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{2,4}\b")


class Column(NamedTuple):
    """A column of a table, by its first rows."""

    name: str
    filled: int  # rows with a value
    distinct: int  # different values
    words: float  # of a value, on average; 0: no strings
    is_number: bool
    is_date: bool
    example: str


def describe_column(name: str, values: Sequence[Any]) -> Column:
    """Describe a column by values as a reader gives them."""
    found = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
    found = [v for v in found if v is not None and str(v).strip()]
    strings = [v for v in found if isinstance(v, str)]
    shown = " ".join(str(found[0]).split()) if found else ""
    return Column(
        name,
        len(found),
        len({spell(v)[0] or str(v) for v in found}),
        sum(len(text.split()) for text in strings) / max(1, len(strings)),
        bool(found) and all(_is_number(v) for v in found),
        bool(found) and all(_DATE.match(str(v)) for v in found),
        shown if len(shown) <= _SHOWN_CHARS else shown[:_SHOWN_CHARS] + "...",
    )


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, list | dict) and bool(np.isfinite(float(value)))
    except ValueError:
        return False


def choose_text(columns: Sequence[Column]) -> Column | None:
    """The column of the texts: one with a usual name, else that with the most words a row."""
    found = [c for c in columns if c.words >= 1 and not c.is_number and not is_id(c.name)]
    longest = max((column.words for column in found), default=0.0)
    named = _by_name([c for c in found if c.words >= longest / 4], _TEXTS)
    return named or max(found, key=lambda column: column.words, default=None)


def possible_labels(columns: Sequence[Column], text: str) -> list[Column]:
    """The columns that may be labels, the likeliest first."""
    names = _LABELS.split()

    def is_class(column: Column) -> bool:
        most = max(2, min(_MANY_LABELS, column.filled // _COPIES))
        is_named = column.name.lower() in names and (column.is_number or column.words <= 3)
        return 2 <= column.distinct and (column.distinct <= most or is_named)

    def rank(column: Column) -> tuple[int, bool, int]:
        at = names.index(column.name.lower()) if column.name.lower() in names else len(names)
        return at, column.is_number, column.distinct

    others = [c for c in columns if c.name != text and not is_id(c.name) and not c.is_date]
    others = [column for column in others if is_class(column)]
    return sorted(others, key=rank)


def _by_name(columns: Sequence[Column], usual: str) -> Column | None:
    by_name = {column.name.lower(): column for column in columns}
    return next((by_name[name] for name in usual.split() if name in by_name), None)


@dataclass
class Summary:
    """What was found in a source, by its first rows."""

    source: SourceConfig  # with its columns
    columns: list[Column]
    task: TextTask | None = None  # None: there are no labels
    reason: str = ""  # for the task
    other_labels: list[str] = field(default_factory=list)  # columns that may be labels, too
    rows: int = 0
    is_whole: bool = True  # whether all rows were counted
    skipped: Counter[str] = field(default_factory=Counter)  # bad rows, by problem
    copies: int = 0  # texts that came before
    conflicts: int = 0  # texts with several labels
    counts: dict[str, int] = field(default_factory=dict)  # texts of each class
    tokens: dict[str, int] = field(default_factory=dict)  # about: median, 95% and most of a text
    total_tokens: int = 0  # about
    scripts: dict[str, float] = field(default_factory=dict)  # share of the letters
    warnings: list[str] = field(default_factory=list)


def summarize(source: SourceConfig, *, wants_labels: bool = True) -> Summary:
    """Look at a source: find columns and task where they are not given, and count.

    Raises:
        DataError: there is no column of texts, or no row that can be used.
    """
    summary = _find_columns(source, wants_labels)
    if wants_labels and _has_labels(summary.source):
        resolved = resolve_source(summary.source)
        summary.source, summary.reason = resolved.source, resolved.description
        _count(summary, resolved.task)
    else:
        _count(summary, None)
    return summary


def _has_labels(source: SourceConfig) -> bool:
    """Whether a column, a folder's name or a format gives the texts labels."""
    if "label_column" in source.model_fields_set:
        return True
    try:
        return any(row.label is not None for row in documents.raw_rows(source, _COLUMN_ROWS))
    except DataError:  # there is no such column
        return False


def _find_columns(source: SourceConfig, wants_labels: bool) -> Summary:
    # A bad row must not end the look at the others.
    source = source.model_copy(update={"on_bad_row": "skip"})
    present = documents.column_names(source, labels=False)
    if not present:
        return Summary(source, [])
    every = source.model_copy(update={"text_column": present[0], "keep_columns": present})
    found_rows = documents.raw_rows(every, _COLUMN_ROWS, labels=False)
    # Rows of plain text, in a folder that has tables as well, have no columns.
    rows = [r.kept for r in found_rows if not r.problem and len(r.kept) == len(present)]
    values = zip(*rows, strict=True) if rows else [()] * len(present)
    columns = [describe_column(n, v) for n, v in zip(present, values, strict=True)]
    source, _ = with_usual_columns(source)
    update: dict[str, Any] = {}
    if source.text_column not in present and "text_column" not in source.model_fields_set:
        text = choose_text(columns)
        if text is None:
            raise DataError(
                f"{', '.join(source.paths)}: no column of texts among {', '.join(present)}; name "
                "it with --text-column"
            )
        update["text_column"] = text.name
    labels = possible_labels(columns, update.get("text_column", source.text_column))
    label = source.label_column
    if label not in present and "label_column" not in source.model_fields_set and labels:
        label = update["label_column"] = labels[0].name
    others = [column.name for column in labels if column.name != label]
    found = Summary(source.model_copy(update=update), columns, other_labels=others)
    _check_given(found.source, present, wants_labels)
    return found


def _check_given(source: SourceConfig, present: Sequence[str], wants_labels: bool) -> None:
    """Raise UserError for a column that an option names and the file lacks."""
    given = [("--text-column", source.text_column)]
    if wants_labels and "label_column" in source.model_fields_set:
        label = source.label_column
        names = [label] if isinstance(label, str) else label
        given += [("--label-column", name) for name in names]
    for option, name in given:
        if not is_present(name, present) and name not in documents.partition_names(source):
            raise UserError(f"{option} {name}: no such column; there are {', '.join(present)}")


def _count(summary: Summary, task: type[TextTask] | None) -> None:
    source = summary.source.model_copy(update={"limit": _MOST_ROWS, "sample": "first"})
    parser = None if task is None else task.parser(source)
    chars, lengths = Counter[str](), list[tuple[int, int]]()
    label_of: dict[int, str] = {}
    conflicts: set[int] = set()
    labels: list[str] = []
    left = _SCRIPT_CHARS
    for table in documents.documents(source, labels=parser, skipped=summary.skipped):
        for text, label in zip(*(table[c].to_pylist() for c in ("text", "label")), strict=True):
            key = text_hash(text, 0)
            if key in label_of:
                summary.copies += 1
                if label_of[key] != label:
                    conflicts.add(key)
            label_of.setdefault(key, label)
            lengths.append((len(text), len(text.split())))
            if left > 0:
                chars.update(text)
                left -= len(text)
            labels.append(label)
    summary.rows, summary.conflicts = len(lengths), len(conflicts)
    summary.is_whole = summary.rows < _MOST_ROWS
    summary.scripts = scripts_of(chars)
    _estimate_tokens(summary, np.array(lengths), share_without_spaces(chars))
    if task is None:
        return
    fitted = task(task.find_labels(sorted(set(labels)), source))
    summary.task = fitted
    summary.warnings = fitted.suspicions(labels, labels, source)
    if not fitted.is_per_token and fitted.output_kind != "number":
        targets = np.asarray(fitted.targets(labels))
        if targets.ndim == 1:
            counts = np.bincount(targets, minlength=len(fitted.labels))
        else:
            counts = np.nansum(targets, axis=0).astype(int)
        summary.counts = dict(zip(fitted.labels, counts.tolist(), strict=True))


def _estimate_tokens(summary: Summary, lengths: Any, without_spaces: float) -> None:
    """Estimate the tokens of texts; `lengths` are characters and words of each, [n, 2]."""
    # About what vocabularies of some thousand tokens give.
    tokens = np.maximum(1.35 * lengths[:, 1], 0.8 * without_spaces * lengths[:, 0])
    tokens = np.ceil(tokens).astype(int) + 2
    median, most = np.percentile(tokens, [50, 95]).astype(int).tolist()
    summary.tokens = {"median": median, "95%": most, "most": int(tokens.max())}
    summary.total_tokens = int(tokens.sum())


def scripts_of(chars: Mapping[str, int]) -> dict[str, float]:
    """The share of each script in the letters, of 1% at least, from the count of each character."""
    found: Counter[str] = Counter()
    for char, count in chars.items():
        if char.isalpha():
            name = re.split(r"[ -]", unicodedata.name(char, "other"))[0].capitalize()
            found[name] += count
    total = found.total()
    return {name: n / total for name, n in found.most_common() if n >= 0.01 * total}
