"""The registry of source formats: which function reads files of which suffix.

To add a format, write a generator that takes (file, shard, columns) and yields a `Row` for every
document of the file, and add an entry to `FORMATS`. A reader yields values as they are in the file,
undecoded where they may not be UTF-8; `row_table` checks them. A row that can't be used is a `Row`
with a problem, an unreadable file is a DataError.

CSV and JSON are read by Python's own modules rather than by Arrow: they keep up with the tokenizer,
stream in constant memory, name the row that is wrong, and continue with the next one.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa

from raybert.data.sources import archive, datasets
from raybert.data.sources.arrow_tables import (
    arrow_columns,
    arrow_types,
    parquet_columns,
    parquet_types,
    read_arrow,
    read_parquet,
)
from raybert.data.sources.cells import Columns
from raybert.data.sources.csv_tables import csv_columns, describe_csv, read_csv
from raybert.data.sources.files import File, ReadOptions, Row, Shard
from raybert.data.sources.json_records import describe_json, json_columns, read_json
from raybert.data.sources.opening import TOO_LONG, lines, open_text, read_document
from raybert.errors import DataError

Reader = Callable[[File, Shard, Columns], Iterator[Row]]


def read_conll(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read CoNLL columns: a word per line, its tag in the last column, sentences between blanks."""
    begin, words, tags = 1, list[str](), list[str]()
    opened = open_text(file, shard.options.encoding)
    with opened.stream as stream:
        for number, line in enumerate(itertools.chain(lines(stream, file.name), [b""]), 1):
            if line is None:
                yield Row(None, None, f"line {number}", TOO_LONG)
                continue
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
    if columns.label is not None and file.label is None:
        raise DataError(
            f"{file.name}: plain text has no labels; use csv, jsonl or parquet (format: csv reads "
            "any table), or a folder for each class with its texts in it"
        )
    opened = open_text(file, shard.options.encoding)
    with opened.stream as stream:
        if shard.document == "file":
            text = read_document(stream, file.name)
            yield Row(text, file.label, None, None if text is not None else TOO_LONG)
            return
        for number, line in enumerate(lines(stream, file.name), 1):
            if line is None:
                yield Row(None, None, f"line {number}", TOO_LONG)
            elif stripped := line.strip():
                yield Row(stripped, file.label, f"line {number}")


class Format(NamedTuple):
    """A file format."""

    read: Reader
    suffixes: tuple[str, ...]  # lower case; one of a compression may follow them
    #: The names of a file's columns; None: it has no names.
    columns: Callable[[File, ReadOptions, Columns], list[str]] | None = None
    #: How a file is written, as it was found out; None: there is nothing to find out.
    describe: Callable[[File, ReadOptions, Columns], str] | None = None
    #: The types of its columns that are plain, by name; None: it has no types.
    types: Callable[[File], dict[str, pa.DataType]] | None = None


FORMATS = {
    "parquet": Format(read_parquet, (".parquet", ".pq"), parquet_columns, None, parquet_types),
    "csv": Format(read_csv, (".csv", ".tsv", ".tab"), csv_columns, describe_csv),
    "jsonl": Format(read_json, (".jsonl", ".ndjson", ".json"), json_columns, describe_json),
    "conll": Format(read_conll, (".conll", ".bio", ".iob2")),
    "text": Format(read_text, (".txt", ".text")),
    "arrow": Format(read_arrow, (".arrow", ".feather"), arrow_columns, None, arrow_types),
}


def read_tar(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read the files in a tar archive that a format knows; others are skipped unread."""
    with file.open_stream() as stream:
        for member in archive.members(stream, file.name, lambda path: _in_tar(path) is not None):
            inner = archive.member_file(file, member)
            format = str(_in_tar(member.path))
            folder = posixpath.basename(posixpath.dirname(member.path))
            if format == "text" and columns.label is not None and folder:  # a folder for each class
                inner, shard = replace(inner, label=folder), replace(shard, document="file")
            for row in FORMATS[format].read(inner, shard, columns):
                place = ": ".join(filter(None, (member.path, row.place)))
                yield row._replace(place=place)


def _in_tar(path: str) -> str | None:
    """The format of an archive's member; None: it is not read."""
    name = format_of(File(path, path, 0, None))
    is_hidden = any(part.startswith((".", "_")) for part in path.removeprefix("./").split("/"))
    return None if is_hidden or name in ("parquet", "arrow") else name


# What `documents` recognizes beside the formats: archives, and data sets with their own layout.
_DATASETS: dict[str, Reader] = {
    "tar": read_tar,
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
    return suffixes().get(file.suffix)
