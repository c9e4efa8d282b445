"""Read JSON: an object a line, an array of objects, or objects over several lines.

An object that has rows in one of its fields, and the forms that pandas' `to_json` writes, are read
too: columns of cells, columns as lists, rows by their index, and names of columns beside lists.
Values are decoded one at a time, so that memory does not grow with the file.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from raybert.data.sources.cells import KEEP, MISSING, Columns, missing, nested
from raybert.data.sources.compression import DAMAGED
from raybert.data.sources.files import File, ReadOptions, Row, Shard
from raybert.data.sources.opening import (
    MAX_RECORD_BYTES,
    RECORD_TOO_LONG,
    Opened,
    damaged,
    lines,
    open_text,
)
from raybert.errors import DataError

_PIECE_CHARS = 1 << 16
_TESTED_LINES = 20  # for whether a file has an object a line
_NAMED_ROWS = 100  # whose keys are the columns of a file


def read_json(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read a file of objects, counted by lines where each has a line, else by rows."""
    opened = open_text(file, shard.options.encoding)
    with opened.stream:
        constants = columns.constants(file, ())
        keys: dict[str, None] = {}  # of all objects
        unfound = dict(columns.keys())
        for place, value in _records(opened, file, columns):
            if isinstance(value, str):
                yield Row(None, None, place, value)
                continue
            if unfound:
                if len(keys) < _NAMED_ROWS:
                    keys |= dict.fromkeys(value)
                unfound = {
                    c: key for c, key in unfound.items()
                    if c not in constants and nested(value, c) is MISSING and key != KEEP
                }  # fmt: skip
            yield _row(value, columns, constants, place)
    if unfound and keys:
        raise DataError(f"{file.name}: {missing(unfound, list(keys))}")


def _row(
    record: Mapping[str, Any], columns: Columns, constants: Mapping[str, Any], place: str
) -> Row:
    cells = {}
    for column, key in columns.keys().items():
        value = nested(record, column)
        value = constants.get(column, MISSING) if value is MISSING else value
        if value is MISSING and key != KEEP:
            what = "no label" if key == "label_column" else f"no {key.replace('_', ' ')}"
            return Row(None, None, place, f"{what} ({missing({column: key}, list(record))})")
        cells[column] = None if value is MISSING else value
    return columns.row(cells.__getitem__, place)


def _records(
    opened: Opened, file: File, columns: Columns
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the place of each object, and it or its problem."""
    if _is_lines(opened.head, file, columns):
        for number, line in enumerate(lines(opened.stream, file.name, MAX_RECORD_BYTES), 1):
            if line is None or line.strip():
                yield f"line {number}", _decode(line)
        return
    values = _Values(opened.stream, file.name)
    for number, value in enumerate(_flatten(values, columns), 1):
        yield f"row {number}", value if isinstance(value, dict) else "not a JSON object"


def _decode(line: bytes | None) -> dict[str, Any] | str:
    if line is None:
        return RECORD_TOO_LONG
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    return value if isinstance(value, dict) else "not a JSON object"


def _is_lines(head: str, file: File, columns: Columns) -> bool:
    """Whether a file that begins with `head` has an object a line."""
    text = head.lstrip()
    if not text.startswith(("[", "{")):
        return bool(text)
    first, _, rest = text.partition("\n")
    if _is_json(first):
        # One array, or one object, may be all rows in a line.
        return bool(rest.strip()) or (first[0] == "{" and _is_record(json.loads(first), columns))
    if text.startswith("["):
        return False
    with contextlib.suppress(ValueError, RecursionError):
        json.JSONDecoder().raw_decode(text)
        return False  # an object over several lines
    if not rest:  # the first line goes on
        return file.suffix in (".jsonl", ".ndjson")
    tested = rest.splitlines()[:_TESTED_LINES]
    return any(line.startswith("{") and _is_json(line) for line in tested)


def _is_record(value: dict[str, Any], columns: Columns) -> bool:
    rows = _rows_of(value, columns, is_only=True)
    return len(rows) == 1 and rows[0] is value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Values:
    """Decodes the values of a stream one after the other."""

    def __init__(self, stream: Any, name: str) -> None:
        self._text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        self._name, self._buffer, self._at = name, "", 0
        self._number = 0

    def _more(self, count: int) -> bool:
        """Append at least one character; False at the end."""
        try:
            piece = self._text.read(count)
        except DAMAGED as error:
            raise damaged(self._name, error) from None
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in " \t\r\n":
                    return self._buffer[self._at]
                self._at += 1
            if not self._more(_PIECE_CHARS):
                return ""

    def skip(self) -> None:
        """Pass the character that `peek` has found."""
        self._at += 1

    def take(self) -> Any:
        """Decode the next value; a DataError where there is none."""
        self._number += 1
        self.peek()
        count = _PIECE_CHARS
        while True:
            at = self._at
            try:
                value, end = json.JSONDecoder().raw_decode(self._buffer, at)
            except RecursionError:
                raise self.error("nested too deep") from None
            except ValueError as error:
                reason = str(error).partition(":")[0]
            else:  # more digits of a number may follow
                if end < len(self._buffer):
                    self._at = end
                    return value
                if not self._more(count):  # which drops what was read
                    self._at = end - at
                    return value
                continue
            if len(self._buffer) - at > MAX_RECORD_BYTES:
                raise self.error(f"{reason}, or {RECORD_TOO_LONG}: write an object a line")
            if not self._more(count):
                raise self.error(reason)
            count *= 2

    def error(self, reason: str) -> DataError:
        """The error for text that is not JSON."""
        return DataError(f"{self._name}: row {self._number}: not JSON ({reason}); fix the file")


def _flatten(values: _Values, columns: Columns) -> Iterator[Any]:
    """Yield the elements of arrays, and the rows of objects."""
    is_first = True
    while first := values.peek():
        if first != "[":
            value = values.take()
            is_only, is_first = is_first and not values.peek(), False
            yield from _rows_of(value, columns, is_only=is_only)
            continue
        is_first = False
        values.skip()
        sign = values.peek()
        while sign != "]":
            yield values.take()
            sign = values.peek()
            if sign not in (",", "]"):
                raise values.error("an array is not closed" if not sign else "no comma follows it")
            if sign == ",":
                values.skip()
        values.skip()


def _rows_of(value: Any, columns: Columns, *, is_only: bool) -> list[Any]:
    """The rows of an object: in the one field that has rows, or in a form of pandas'; else itself.

    `is_only`: the file has no other object, so lists may be columns.
    """
    if not isinstance(value, dict):
        return [value]
    texts = nested(value, columns.text)
    if texts is MISSING:
        found = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if len(found) > 1:  # of the features of a table, and its rows
            found = [rows for rows in found if nested(rows[0], columns.text) is not MISSING]
        if len(found) == 1:
            return found[0]
        names, rows = value.get("columns"), value.get("data")
        if is_only and isinstance(names, list) and isinstance(rows, list):
            return [
                dict(zip(map(str, names), row, strict=False)) if isinstance(row, list) else row
                for row in rows
            ]
        by_index = [row for row in value.values() if isinstance(row, dict)]
        is_table = len(by_index) == len(value) > 1 and len({tuple(row) for row in by_index}) == 1
        return by_index if is_only and is_table else [value]
    if isinstance(texts, dict):
        given = {name: cells for name, cells in value.items() if isinstance(cells, dict)}
        return [{name: cells.get(key) for name, cells in given.items()} for key in texts]
    lists = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    sizes = {len(cells) for cells in lists.values()}
    if is_only and isinstance(texts, list) and sizes == {len(texts)} and _are_texts(texts):
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    return [value]


def _are_texts(cells: list[Any]) -> bool:
    """Whether strings are texts, and not the words of one."""
    return any(isinstance(cell, str) and len(cell.split()) > 1 for cell in cells)


def json_columns(file: File, options: ReadOptions, columns: Columns) -> list[str]:
    """The keys of the first objects; empty where there are none."""
    names: dict[str, None] = {}
    with contextlib.suppress(DataError):
        opened = open_text(file, options.encoding)
        with opened.stream:
            for _, value in itertools.islice(_records(opened, file, columns), _NAMED_ROWS):
                names |= dict.fromkeys(value) if isinstance(value, dict) else {}
    return list(names)


def describe_json(file: File, options: ReadOptions, columns: Columns) -> str:
    """How the objects are written."""
    opened = open_text(file, options.encoding)
    with opened.stream:
        form = (
            "an object a line" if _is_lines(opened.head, file, columns) else "objects in one text"
        )
        return f"{form}, {opened.encoding}"
