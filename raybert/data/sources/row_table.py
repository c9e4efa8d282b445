"""Check rows and collect them in Arrow tables: text cleaned, labels normalized, problems named.

A bad row stays in the table, with its problem and its place. The consumer, which reads the tables
in order, raises for it or counts it: so the same row fails for any number of readers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raybert.data.preprocess import replace_line_breaks
from raybert.data.sources.files import Row
from raybert.data.sources.labels import name_of
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError, printable
from raybert.records import finite

_BATCH_ROWS = 2048
_BATCH_CHARS = 1 << 21
#: The raw text and label of a row -> its text, its label as a string, None; or its problem last.
LabelParser = Callable[[Any, Any], tuple[Any, str | None, str | None]]
KEPT = "kept"  # a JSON list of the values of `keep_columns`
SCHEMA = pa.schema(
    [
        ("text", pa.string()),  # null where there is a problem
        ("label", pa.string()),
        ("problem", pa.string()),  # why the row can't be used; null for a good one
        ("place", pa.string()),  # where a bad row is; null for a good one
    ]
)


def schema_of(config: SourceConfig) -> pa.Schema:
    """The columns of a source's tables: `SCHEMA`, `other_columns`, and KEPT if any are kept."""
    names = [*config.other_columns, *([KEPT] if config.keep_columns else [])]
    return pa.schema([*SCHEMA, *(pa.field(name, pa.string()) for name in names)])


class RowTable:
    """Collects rows up to the size of a batch."""

    def __init__(self, config: SourceConfig, labels: LabelParser | None) -> None:
        self._config, self._parse = config, labels
        self._schema, self._names = schema_of(config), list(config.other_columns)
        self._has_kept = bool(config.keep_columns)
        self._clear()

    def _clear(self) -> None:
        self._columns: tuple[list[str | None], ...] = tuple([] for _ in self._schema)
        self._chars = 0

    def __len__(self) -> int:
        return len(self._columns[0])

    @property
    def is_full(self) -> bool:
        """Whether the rows make up a batch."""
        return self._chars >= _BATCH_CHARS or len(self) >= _BATCH_ROWS

    def flush(self) -> pa.Table:
        """Return the rows as a table of `SCHEMA` and start again."""
        table = pa.table([pa.array(c, pa.string()) for c in self._columns], schema=self._schema)
        self._clear()
        return table

    def add(self, row: Row, file_name: str) -> bool:
        """Add a row; return whether it is a good one."""
        raw, label, problem = row.text, None, row.problem
        text: str | None = None
        if problem is None and not isinstance(raw, list):
            text, problem = self._check_text(raw)
        if problem is None and isinstance(raw, list) and self._parse is None:
            if all(isinstance(word, str) for word in raw):
                raw = " ".join(raw)
            else:
                problem = "text is neither a string nor a list of words"
        if problem is None and self._parse is not None:
            raw, label, problem = self._parse(raw, row.label)
        if problem is None and raw is not row.text:  # the label's parser made it
            text, problem = self._check_text(raw)
        others: list[str | None] = [None] * len(self._names)
        values = row.others or others  # data sets with a layout of their own have no columns
        for index, name in enumerate(self._names if problem is None else ()):
            value = values[index]  # a group may be a number
            others[index], found = self._check_text(str(value) if type(value) is int else value)
            problem = problem or (found and f"{name}: {found}")
        texts, labels, problems, places, *columns = self._columns
        labels.append(label)
        problems.append(problem)
        if self._has_kept:
            others.append(_plain_json(row.kept) if problem is None else None)
        for column, cell in zip(columns, others, strict=True):
            column.append(cell)
        if problem is None:
            assert text is not None
            self._chars += len(text) + sum(len(cell or "") for cell in others)
            texts.append(text)
            places.append(None)
            return True
        texts.append(None)
        place = f"{file_name}: {row.place}" if row.place else file_name
        place = place.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        places.append(printable(place))
        problems[-1] = printable(problem)
        return False

    def _check_text(self, value: Any) -> tuple[str | None, str | None]:
        """Return (text, None), or (None, problem)."""
        if value is None:
            return None, "empty"
        if not isinstance(value, bytes | str):
            return None, f"not text ({type(value).__name__})"
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else value
            if text is value and not text.isascii():
                text.encode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            return None, f"not UTF-8 (byte {error.start + 1} is 0x{byte:02x})"
        except UnicodeEncodeError as error:
            shown = f"character {error.start + 1}"
            escaped = ord(error.object[error.start]) - 0xDC00
            if 0x80 <= escaped <= 0xFF:  # a byte as surrogateescape encodes it
                shown += f" is byte 0x{escaped:02x}"
            return None, f"not UTF-8 ({shown})"
        text = replace_line_breaks(text, self._config.html_breaks).strip()
        return (text, None) if text else (None, "empty")


def _plain_json(values: Sequence[Any]) -> str:
    """Values of any type as a JSON list; what JSON has no type for as a string."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return value.isoformat() if hasattr(value, "isoformat") else str(value)

    text = json.dumps(finite(values), ensure_ascii=False, default=plain)
    return text.encode("utf-8", "replace").decode()


def parse_label(
    text: Any, value: Any, names: list[str] | None = None
) -> tuple[Any, str | None, str | None]:
    """A `LabelParser`: one label, a name or a number; `names` are those that are allowed."""
    return text, *name_of(value, names)


def accept(table: pa.Table, on_bad_row: str, skipped: Counter[str]) -> pa.Table:
    """Drop and count a table's bad rows, or raise for the first one if `on_bad_row` is fail.

    A bad row without a place is an unreadable file, and always raises.
    """
    problems = table.column("problem")
    if problems.null_count == len(problems):
        return table
    for row in table.select(["problem", "place"]).to_pylist():
        if row["problem"] is None:
            continue
        if row["place"] is None:
            raise DataError(row["problem"])
        if on_bad_row == "fail":
            encoding = "set encoding, as cp1252, or " if "not UTF-8" in row["problem"] else ""
            raise DataError(
                f"{row['place']}: {row['problem']}; {encoding}fix the row, or set on_bad_row: skip "
                "beside its source's path"
            )
        skipped[_kind_of_problem(row["problem"])] += 1
    return table.filter(problems.is_null())


def first_good(table: pa.Table, count: int | None) -> pa.Table:
    """Keep the rows up to the `count`th good one, so that no later row raises; None keeps all."""
    if count is None or count >= table.num_rows:
        return table
    good = table.column("problem").is_null().to_numpy()
    return table.slice(0, int(np.searchsorted(np.cumsum(good), count)) + 1 if count else 0)


def _kind_of_problem(problem: str) -> str:
    """A problem without its details, under which it is counted."""
    return "unknown label" if problem.startswith("label '") else problem.split(" (")[0]
