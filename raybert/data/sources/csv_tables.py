"""Read CSV and TSV files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from raybert.data.sources.cells import Columns
from raybert.data.sources.compression import DAMAGED
from raybert.data.sources.csv_records import records
from raybert.data.sources.dialect import Table, detect_table
from raybert.data.sources.files import File, ReadOptions, Row, Shard
from raybert.data.sources.opening import damaged, open_text
from raybert.errors import DataError

_SHOWN_CHARS = 40  # of a cell in a message


def read_csv(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read a table; rows count from 1 after the header."""
    opened = open_text(file, shard.options.encoding)
    with opened.stream as stream:
        table = detect_table(opened.head, file, shard.options, columns)
        if not table.names:
            return
        constants = columns.constants(file, table.names)
        _check(file, table, columns)
        places = {c: table.names.index(c) for c in columns.keys() if c not in constants}
        number = 0
        header = table.names if len(table.names) > 1 else None  # of tables that were joined
        try:
            for fields in _records(stream, table):
                number += 1
                place = f"row {number}"
                if isinstance(fields, str):
                    yield Row(None, None, place, fields)
                    continue
                if table.has_header and [field.strip() for field in fields] == header:
                    yield Row(None, None, place, "the header once more")
                    continue
                cells = {column: fields[at] for column, at in places.items()} | constants
                yield columns.row(cells.__getitem__, place)
        except DAMAGED as error:
            raise damaged(file.name, error) from None


def _records(stream: Any, table: Table) -> Iterator[list[str] | str]:
    # Bytes that are not UTF-8 become lone surrogates, so that a message can name the row.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    if table.has_separator_line:
        text.readline()
    found = records(text.readline, table.dialect, len(table.names))
    if table.has_header:
        next(found)
    return found


def _check(file: File, table: Table, columns: Columns) -> None:
    try:
        columns.check(file, table.names)
    except DataError as error:
        is_odd = len(table.names) == 1 or any(" " in name for name in table.names)
        if table.has_header and not is_odd:
            raise
        if table.has_header:
            raise DataError(
                f"{error} (read with {table}, and the first row as a header; else set delimiter, "
                "or header: false)"
            ) from None
        raise DataError(
            f"{error} (it has no header line; columns are numbers, and header: true reads the "
            "first row as their names)"
        ) from None


def csv_columns(file: File, options: ReadOptions, columns: Columns) -> list[str]:
    """The names of a table's columns; empty where it can't be read."""
    with contextlib.suppress(DataError):
        opened = open_text(file, options.encoding)
        with opened.stream:
            return detect_table(opened.head, file, options, columns).names
    return []


def describe_csv(file: File, options: ReadOptions, columns: Columns) -> str:
    """How a table is written."""
    opened = open_text(file, options.encoding)
    with opened.stream:
        return f"{detect_table(opened.head, file, options, columns)}, {opened.encoding}"
