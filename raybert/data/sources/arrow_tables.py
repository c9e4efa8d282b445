"""Read Parquet and Arrow files; class names that `datasets` stores in their schema are applied.

Strings are read as bytes, since neither format ensures UTF-8, and in batches of bounded size.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.sources.cells import MISSING, Columns, nested
from raybert.data.sources.files import File, ReadOptions, Row, Shard
from raybert.errors import DataError, one_line

_BATCH_ROWS, _BATCH_BYTES = 1024, 64 << 20
# Arrow raises all of these for files whose bytes were altered.
_DAMAGED = (
    pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError,
    RecursionError, NotImplementedError,
)  # fmt: skip


class NamedClass(str):
    """A class's name in the file's metadata, with its number."""

    number: int


def read_parquet(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read a Parquet file."""
    return _read(file, columns, _open_parquet, _parquet_batches, "Parquet")


def read_arrow(file: File, shard: Shard, columns: Columns) -> Iterator[Row]:
    """Read an Arrow file, or a stream as `datasets` saves it."""
    return _read(file, columns, _open_arrow, _arrow_batches, "Arrow")


def _open_parquet(stream: Any) -> tuple[Any, pa.Schema]:
    # Without a buffer: with one, Arrow allocates what a damaged page says that it needs, 2 GB.
    parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=0)
    return parquet, parquet.schema_arrow


def _parquet_batches(parquet: Any, wanted: Sequence[str]) -> Iterator[Any]:
    for group in range(parquet.num_row_groups):
        # The sizes of single columns are not asked for: Arrow ends the process if they are damaged.
        metadata = parquet.metadata.row_group(group)
        rows = _BATCH_BYTES * max(1, metadata.num_rows) // max(1, metadata.total_byte_size)
        rows = min(_BATCH_ROWS, max(1, rows))
        yield from parquet.iter_batches(batch_size=rows, row_groups=[group], columns=wanted)


def _open_arrow(stream: Any) -> tuple[Any, pa.Schema]:
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
    return reader, reader.schema


def _arrow_batches(reader: Any, wanted: Sequence[str]) -> Iterator[Any]:
    found = reader
    if hasattr(reader, "num_record_batches"):  # a file, not a stream
        found = (reader.get_batch(i) for i in range(reader.num_record_batches))
    for batch in found:
        # Arrow itself checks nothing: an altered offset is read as memory of somebody else.
        columns = [_as_binary(batch.column(name)) for name in wanted]
        batch = pa.record_batch(columns, names=list(wanted))
        batch.validate(full=True)
        for begin in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(begin, _BATCH_ROWS)


def _read(
    file: File,
    columns: Columns,
    open_file: Callable[[Any], tuple[Any, pa.Schema]],
    batches: Callable[[Any, Sequence[str]], Iterator[Any]],
    kind: str,
) -> Iterator[Row]:
    name, number = file.name, 0
    with file.open_seekable() as stream:
        try:
            opened, schema = open_file(stream)
            names = [str(name) for name in schema.names]
        except _DAMAGED as error:
            raise DataError(
                f"{name} is no {kind} file, or is cut short: {one_line(error)}"
            ) from None
        columns.check(file, names)
        constants = columns.constants(file, names)
        wanted = [c if c in names else c.partition(".")[0] for c in columns.keys()]
        wanted = [c for c in dict.fromkeys(wanted) if c in names]
        classes = class_names(schema)
        try:
            for batch in batches(opened, wanted):
                values = [_values(batch.column(column), classes.get(column)) for column in wanted]
                for cells in zip(*values, strict=True):
                    number += 1
                    record = dict(zip(wanted, cells, strict=True))
                    yield _row(record, columns, constants, f"row {number}")
        except _DAMAGED as error:
            raise DataError(
                f"{name}: damaged after row {number}: {one_line(error)}; write the file again"
            ) from None


def _row(record: dict[str, Any], columns: Columns, constants: dict[str, Any], place: str) -> Row:
    def cell(column: str) -> Any:
        if column in constants:
            return constants[column]
        value = nested(record, column)
        return None if value is MISSING else value

    return columns.row(cell, place)


def _values(column: Any, names: list[str] | None = None) -> list[Any]:
    """A column's Python values; `names` are those of its classes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column, kind = _as_binary(column), column.type
    if pa.types.is_floating(kind) and not pa.types.is_float64(kind):
        # The shortest number that is this float32: 0.1, and not 0.10000000149.
        return [
            None if value is None else float(value)
            for value in column.cast(pa.string()).to_pylist()
        ]
    values = column.to_pylist()
    if names is None:
        return list(values)
    return [_named(value, names) for value in values]


def _as_binary(column: Any) -> Any:
    """A column of strings as bytes; any other as it is."""
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        return column.cast(pa.binary())
    return column.cast(pa.large_binary()) if pa.types.is_large_string(column.type) else column


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if not isinstance(value, int) or not 0 <= value < len(names):
        return None if value == -1 else value  # -1 is how datasets write a missing label
    named = NamedClass(names[value])
    named.number = value
    return named


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes of each column, from what `datasets` writes into a schema."""
    found = {}
    with contextlib.suppress(ValueError, RecursionError):
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = (info.get("info") or {}).get("features") if isinstance(info, dict) else None
        for column, feature in (features or {}).items() if isinstance(features, dict) else ():
            while isinstance(feature, list) and feature:  # an older way to write a sequence
                feature = feature[0]
            while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
                feature = feature["feature"]
            names = feature.get("names") if isinstance(feature, dict) else None
            if isinstance(names, list) and names:
                found[str(column)] = [str(name) for name in names]
    return found


def parquet_columns(file: File, options: ReadOptions, columns: Columns) -> list[str]:
    """The columns of a Parquet file; empty where it can't be read."""
    schema = _schema(file, _open_parquet)
    return [] if schema is None else [str(name) for name in schema.names]


def arrow_columns(file: File, options: ReadOptions, columns: Columns) -> list[str]:
    """The columns of an Arrow file; empty where it can't be read."""
    schema = _schema(file, _open_arrow)
    return [] if schema is None else [str(name) for name in schema.names]


def parquet_types(file: File) -> dict[str, pa.DataType]:
    """The types of a Parquet file's columns of numbers, booleans and strings."""
    return _plain_types(_schema(file, _open_parquet))


def arrow_types(file: File) -> dict[str, pa.DataType]:
    """The types of an Arrow file's columns of numbers, booleans and strings."""
    return _plain_types(_schema(file, _open_arrow))


def _schema(file: File, open_file: Callable[[Any], tuple[Any, pa.Schema]]) -> pa.Schema | None:
    with contextlib.suppress(*_DAMAGED), file.open_seekable() as stream:
        schema = open_file(stream)[1]
        _ = schema.names  # they are decoded only here
        return schema
    return None


def _plain_types(schema: pa.Schema | None) -> dict[str, pa.DataType]:
    is_plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return {
        str(field.name): field.type
        for field in schema or ()
        if any(test(field.type) for test in is_plain)
    }
