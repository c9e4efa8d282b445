"""The registry of source formats: which function reads files of which suffix.

To add a format, write a generator that takes (file, shard, columns) and yields a `Row` for every
document of the file, and add an entry to `FORMATS`. A reader yields values as they are in the file,
undecoded where they may not be UTF-8; `row_table` checks them. A row that can't be used is a `Row`
with a problem, an unreadable file is a DataError.

CSV and JSON are read by Python's own modules rather than by Arrow: they keep up with the tokenizer,
stream in constant memory, name the row that is wrong, and continue with the next one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.sources import archive, datasets
from raybert.data.sources.files import Columns, File, Row, Shard
from raybert.errors import DataError, one_line

_CSV_FIELD_BYTES = 1 << 30  # at most; csv's own limit of 128 KiB is shorter than a book

Reader = Callable[[File, Shard, Columns], Iterator[Row]]


def read_parquet(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read a Parquet file in batches of 1,024 rows."""
    name = file.name
    with file.open_seekable() as stream:
        try:
            parquet = pq.ParquetFile(stream)
        except pa.ArrowException as error:
            raise DataError(
                f"{name} is no Parquet file, or is cut short: {one_line(error)}"
            ) from None
        _check_columns(name, columns, parquet.schema_arrow.names)
        wanted = list(columns.keys())
        number = 0
        try:
            for batch in parquet.iter_batches(batch_size=1024, columns=wanted):
                values = [_values(batch.column(column)) for column in wanted]
                for cells in zip(*values, strict=True):
                    number += 1
                    named = dict(zip(wanted, cells, strict=True))
                    yield columns.row(named.__getitem__, f"row {number}")
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{name}: damaged after row {number}: {one_line(error)}; write the file again"
            ) from None


def _values(column: Any) -> list[Any]:
    """A column's Python values; strings as bytes, since Parquet does not ensure UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())


def parquet_columns(file: File) -> list[str]:
    """The columns of a Parquet file; empty where it can't be read."""
    with file.open_seekable() as stream:
        try:
            return list(pq.ParquetFile(stream).schema_arrow.names)
        except pa.ArrowException:
            return []


def read_csv(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read CSV, or TSV by the suffix, with a header line; rows count from 1 after the header."""
    number = 0
    with file.open_stream() as stream:
        reader = _csv_rows(file, stream)
        try:
            header = next(reader, None)
            if header is None:
                return
            _check_columns(file.name, columns, header)
            places = {column: header.index(column) for column in columns.keys()}
            last = max(places.values())
            for fields in reader:
                if not fields:
                    continue
                number += 1
                if len(fields) <= last:
                    yield Row(None, None, f"row {number}", "too few columns")
                    continue
                named = {column: fields[at] for column, at in places.items()}
                yield columns.row(named.__getitem__, f"row {number}")
        except csv.Error as error:
            raise DataError(f"{file.name}: row {number + 1}: {error}") from None
        except (OSError, EOFError) as error:
            raise archive.truncated(file.name, str(error)) from None


def csv_columns(file: File) -> list[str]:
    """The header of a CSV or TSV file; empty where it can't be read."""
    with file.open_stream() as stream:
        try:
            return next(_csv_rows(file, stream), [])
        except (csv.Error, OSError, EOFError):
            return []


def _csv_rows(file: File, stream: Any) -> Iterator[list[str]]:
    # One limit for the whole process: never lowered again, since other readers may be active.
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_BYTES))
    delimiter = "\t" if ".tsv" in Path(file.path).suffixes else ","
    # Bytes that are not UTF-8 become lone surrogates, so that a message can name the row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    return csv.reader(text, delimiter=delimiter)


def read_jsonl(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read one JSON object per line; empty lines are skipped."""
    is_first = True
    with file.open_stream() as stream:
        for number, line in enumerate(lines(stream, file.name), 1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                value = json.loads(line)
            except UnicodeDecodeError:
                yield Row(None, None, place, "not UTF-8")
                continue
            except (ValueError, RecursionError):
                yield Row(None, None, place, "not JSON")
                continue
            if not isinstance(value, dict):
                yield Row(None, None, place, "not a JSON object")
                continue
            if is_first:
                _check_columns(file.name, columns, list(value))
            is_first = False
            if columns.text not in value:
                yield Row(None, None, place, "no text column")
                continue
            yield columns.row(value.get, place)


def jsonl_columns(file: File) -> list[str]:
    """The keys of the first JSON object; empty where there is none."""
    with file.open_stream() as stream:
        for line in lines(stream, file.name):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line) if line.strip() else None
                if isinstance(value, dict):
                    return list(value)
    return []


def read_conll(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read CoNLL columns: a word per line, its tag in the last column, sentences between blanks."""
    begin, words, tags = 1, list[str](), list[str]()
    with file.open_stream() as stream:
        for number, line in enumerate(itertools.chain(lines(stream, file.name), [b""]), 1):
            fields = line.decode("utf-8", "surrogateescape").split()
            if fields and not line.startswith(b"-DOCSTART-"):
                begin = begin if words else number
                words.append(fields[0])
                tags.append(fields[-1] if len(fields) > 1 else "")
            elif words:
                yield Row(words, tags if columns.label else None, f"line {begin}")
                words, tags = [], []


def read_text(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read plain text: a document per line (empty lines are skipped), or one per file."""
    if columns.label is not None:
        raise DataError(
            f"{file.name}: plain text has no labels; use csv, jsonl or parquet, or a folder laid "
            "out as aclImdb"
        )
    with file.open_stream() as stream:
        if shard.document == "file":
            yield Row(archive.read_all(stream, file.name), None)
            return
        for number, line in enumerate(lines(stream, file.name), 1):
            if stripped := line.strip():
                yield Row(stripped, None, f"line {number}")


def lines(stream: Any, name: str) -> Iterator[bytes]:
    """Yield a stream's lines without their line feeds; a DataError if it is damaged."""
    try:
        for line in io.BufferedReader(stream, 1 << 20):
            yield line.removesuffix(b"\n")
    except (OSError, EOFError) as error:
        raise archive.truncated(name, str(error)) from None


def _check_columns(name: str, columns: Columns, present: Sequence[str]) -> None:
    for column, key in columns.keys().items():
        if column not in present:
            shown = ", ".join(present[:12]) + (", ..." if len(present) > 12 else "")
            raise DataError(f"{name}: no column {column!r}; set {key} to one of: {shown}")


class Format(NamedTuple):
    """A file format."""

    read: Reader
    suffixes: tuple[str, ...]  # lower case; `.gz` and `.zst` may follow them
    columns: Callable[[File], list[str]] | None = None  # their names; None: it has no names


FORMATS = {
    "parquet": Format(read_parquet, (".parquet", ".pq"), parquet_columns),
    "csv": Format(read_csv, (".csv", ".tsv"), csv_columns),
    "jsonl": Format(read_jsonl, (".jsonl", ".ndjson", ".json"), jsonl_columns),
    "conll": Format(read_conll, (".conll", ".bio", ".iob2")),
    "text": Format(read_text, (".txt", ".text")),
}
# Data sets with a layout of their own, which `documents` recognizes.
_DATASETS: dict[str, Reader] = {
    "imdb-archive": datasets.read_imdb_archive,
    "imdb-file": datasets.read_imdb_file,
    "sample": datasets.read_sample,
}


def reader_of(name: str) -> Reader:
    """Return the reader of a format, or of a data set with a layout of its own."""
    return FORMATS[name].read if name in FORMATS else _DATASETS[name]


def suffixes() -> dict[str, str]:
    """Map each suffix to the name of its format."""
    return {suffix: name for name, format in FORMATS.items() for suffix in format.suffixes}


def format_of(file: File) -> str | None:
    """The format of a file by its suffix; None where no format has it."""
    stem, suffix = posixpath.splitext(file.path.lower())
    if suffix in (".gz", ".zst"):
        suffix = posixpath.splitext(stem)[1]
    return suffixes().get(suffix)
