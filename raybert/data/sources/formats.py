"""One reader a format: each turns a stream into rows of (text, label, place), nothing held back.

Values come as they stand in the file, undecoded where they may not be UTF-8; `sources` judges them.
Python's own csv and json are used rather than Arrow's: they keep up with the tokenizer, they stream
in constant memory, and they can name the row that is wrong and go on with the next.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.sources import archive
from raybert.errors import DataError

_CSV_FIELD_LIMIT = 1 << 30  # bytes in one field; csv's own limit of 128 KiB is shorter than a book


class Row(NamedTuple):
    """A row as found. `problem` is why it can't be used, where the reader itself can tell."""

    text: Any  # str, bytes, None, or what else stands in the column
    label: Any
    place: int | str  # row or line from 1, or a path
    problem: str | None = None


class Columns(NamedTuple):
    """Which columns to read; `label` is None where labels are not wanted."""

    text: str
    label: str | None


def read_parquet(stream: Any, name: str, columns: Columns) -> Iterator[Row]:
    """Read a Parquet file by batches of 1,024 rows; `stream` must be seekable."""
    try:
        file = pq.ParquetFile(stream)
    except pa.ArrowException as error:
        raise DataError(f"{name} is no Parquet file, or is cut short: {_brief(error)}") from None
    wanted = [column for column in columns if column is not None]
    for column in wanted:
        if column not in file.schema_arrow.names:
            raise missing_column(name, column, columns, file.schema_arrow.names)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            texts = _values(batch.column(columns.text))
            labels = _values(batch.column(columns.label)) if columns.label else [None] * len(texts)
            for text, label in zip(texts, labels, strict=True):
                number += 1
                yield Row(text, label, number)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{name}: damaged after row {number}: {_brief(error)}; write the file again"
        ) from None


def _values(column: Any) -> list[Any]:
    """A column's Python values; strings as bytes, since Parquet does not promise UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())


def read_csv(stream: BinaryIO, name: str, columns: Columns, delimiter: str) -> Iterator[Row]:
    """Read CSV with a header line; rows count from 1 after the header."""
    # One limit for the whole process: never lowered again, as other readers may be under way.
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
    # Bytes that are not UTF-8 come as lone surrogates, so that the row can be named.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    number = 0
    try:
        header = next(reader, None)
        if header is None:
            return
        at = _position(header, columns.text, columns, name)
        label_at = _position(header, columns.label, columns, name) if columns.label else None
        last = max(at, label_at or 0)
        for fields in reader:
            if not fields:
                continue
            number += 1
            if len(fields) <= last:
                yield Row(None, None, number, "too few columns")
                continue
            yield Row(fields[at], None if label_at is None else fields[label_at], number)
    except csv.Error as error:
        raise DataError(f"{name}: row {number + 1}: {error}") from None
    except (OSError, EOFError) as error:
        raise archive.truncated(name, str(error)) from None


def _position(header: Sequence[str], column: str, columns: Columns, name: str) -> int:
    if column not in header:
        raise missing_column(name, column, columns, header)
    return header.index(column)


def read_jsonl(stream: BinaryIO, name: str, columns: Columns) -> Iterator[Row]:
    """Read one JSON object a line; empty lines are passed over."""
    first = True
    for number, line in enumerate(lines(stream, name), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            yield Row(None, None, number, "not UTF-8")
            continue
        except (ValueError, RecursionError):
            yield Row(None, None, number, "not JSON")
            continue
        if not isinstance(value, dict):
            yield Row(None, None, number, "not a JSON object")
            continue
        for column in columns if first else ():
            if column is not None and column not in value:
                raise missing_column(name, column, columns, list(value))
        first = False
        if columns.text not in value:
            yield Row(None, None, number, "no text column")
            continue
        label = value.get(columns.label) if columns.label else None
        yield Row(value[columns.text], label, number)


def read_lines(stream: BinaryIO, name: str) -> Iterator[Row]:
    """Read one document a line; empty lines separate nothing and are passed over."""
    for number, line in enumerate(lines(stream, name), 1):
        if stripped := line.strip():
            yield Row(stripped, None, number)


def read_whole(stream: BinaryIO, name: str) -> Iterator[Row]:
    """Read the whole file as one document."""
    try:
        yield Row(stream.read(), None, 1)
    except (OSError, EOFError) as error:
        raise archive.truncated(name, str(error)) from None


def read_imdb(
    stream: BinaryIO, name: str, place: Callable[[str], tuple[str, str | None] | None]
) -> Iterator[Row]:
    """Read an `aclImdb` archive; `place` maps a member's path to (split, label), None to pass."""
    for path, content in archive.members(stream, name):
        found = place(path)
        if found is not None:
            yield Row(content, found[1], path)


def lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield a stream's lines without their line feeds."""
    pieces: list[bytes] = []  # of a line that has not ended yet
    while True:
        try:
            chunk = stream.read(1 << 20)
        except (OSError, EOFError) as error:
            raise archive.truncated(name, str(error)) from None
        if not chunk:
            break
        pieces.append(chunk)
        if b"\n" in chunk:
            *whole, rest = b"".join(pieces).split(b"\n")
            pieces = [rest]
            yield from whole
    if last := b"".join(pieces):
        yield last


def missing_column(name: str, column: str, columns: Columns, present: Sequence[str]) -> DataError:
    """The error for a column that the file does not have."""
    key = "text_column" if column == columns.text else "label_column"
    shown = ", ".join(present[:12]) + (", ..." if len(present) > 12 else "")
    return DataError(f"{name}: no column {column!r}; set {key} to one of: {shown}")


def _brief(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
