"""Which columns of a file are read, and where their values are.

A column may be a field of a nested one (`review.text`), a part of the path (`label=pos/part-0`),
or, for labels, the folder of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from raybert.data.sources.files import File, Row
from raybert.errors import DataError, printable

_SHOWN, _SHOWN_CHARS = 12, 60  # names in a message
KEEP = "keep_columns"  # the setting of columns that are null where a file lacks them
#: How a message names a setting that an option of the command line sets, too.
_OPTIONS = {
    "text_column": "text_column (--text-column)",
    "label_column": "label_column (--label-column)",
}
MISSING = object()  # the value of a column that a record does not have


class Columns(NamedTuple):
    """Which columns to read; `label` is None where labels are not wanted."""

    text: str
    label: str | tuple[str, ...] | None = None
    others: Mapping[str, str] = {}  # columns by what they are: pair, group
    kept: tuple[str, ...] = ()  # that are passed through as they are

    def keys(self) -> dict[str, str]:
        """The setting that names each column."""
        labels = (self.label,) if isinstance(self.label, str) else self.label or ()
        others = {column: f"{name}_column" for name, column in self.others.items()}
        kept = dict.fromkeys(self.kept, KEEP)
        return {
            **kept, self.text: "text_column", **others, **dict.fromkeys(labels, "label_column")
        }  # fmt: skip

    def row(self, cell: Callable[[str], Any], place: str) -> Row:
        """Make a row of cells by the names of their columns."""
        label = self.label
        if isinstance(label, tuple):
            value: Any = {name: cell(name) for name in label}
        else:
            value = None if label is None else cell(label)
        others = tuple(map(cell, self.others.values()))
        return Row(cell(self.text), value, place, None, others, tuple(map(cell, self.kept)))

    def constants(self, file: File, present: Sequence[str]) -> dict[str, Any]:
        """The columns that the file lacks and its path has, with their values."""
        found: dict[str, Any] = {
            column: value
            for column, value in file.partition.items()
            if column in self.keys() and not is_present(column, present)
        }
        for column in self.kept:
            if not is_present(column, present):
                found.setdefault(column, None)
        if file.label is not None and isinstance(self.label, str) and self.label not in present:
            found[self.label] = file.label
        return found

    def check(self, file: File, present: Sequence[str]) -> None:
        """Raise a DataError for a column that neither the file nor its path has, or has twice."""
        constants, keys = self.constants(file, present), self.keys()
        for column, key in keys.items():
            if present.count(column) > 1 and key != KEEP:
                raise DataError(
                    f"{file.name}: {present.count(column)} columns have the name {column!r}; "
                    f"rename one of them, or set {key} to another one"
                )
        lacking = [c for c in keys if c not in constants and not is_present(c, present)]
        if lacking:
            raise DataError(f"{file.name}: {missing({c: keys[c] for c in lacking}, present)}")


def is_present(column: str, present: Sequence[str]) -> bool:
    """Whether there is a column of that name, or one that it may be nested in."""
    return column in present or column.partition(".")[0] in present


def missing(columns: Mapping[str, str], present: Sequence[str]) -> str:
    """The problem of columns that are not there; `columns` are the settings that name them."""
    shown = ", ".join(_shown_name(name) for name in present[:_SHOWN])
    more = ", ..." if len(present) > _SHOWN else ""
    keys = dict.fromkeys(_OPTIONS.get(key, key) for key in columns.values())
    return (
        f"no column {' and no column '.join(map(repr, columns))}; set {' and '.join(keys)} to one "
        f"of: {shown}{more}"
    )


def _shown_name(name: str) -> str:
    more = "..." if len(name) > _SHOWN_CHARS else ""
    return (printable(name, _SHOWN_CHARS) or "(no name)") + more


def nested(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field in nested ones; MISSING where there is none."""
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name[:9]) < len(value):
            value = value[int(name[:9])]
        else:
            return MISSING
    return value
