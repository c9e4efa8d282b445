"""Texts that a program holds in memory, as files that stages read.

Each table is written once, under a name that is a hash of its content: the same texts are the same
source, so that a run is resumed, and other texts are refused where a run has begun.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raybert.errors import DataError, one_line
from raybert.storage.folder import Folder

_KINDS = (
    "a path, a list of texts, a list of dicts, a dict of columns, a pandas DataFrame, a pyarrow "
    "Table, or a dataset of `datasets` or Ray"
)


def source_path(data: Any, folder: Folder) -> str | list[str]:
    """The path of a source for data: paths stay, tables are written to a folder.

    A string or path-like object is a path, and a list of path-like objects are paths; a list of
    strings are texts.

    Raises:
        DataError: the data is no table of texts.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    if isinstance(data, list | tuple) and data and isinstance(data[0], os.PathLike):
        return [os.fspath(path) for path in data]
    table = to_table(data)
    if not table.num_rows:
        raise DataError("the data has no rows; give at least a few texts")
    sink = io.BytesIO()
    pq.write_table(table, sink)
    content = sink.getvalue()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    if not folder.exists(name):  # its time of modification is part of a source
        folder.write_bytes(name, content)
    return folder.join(name) if folder.is_local else (folder / name).uri


def to_table(data: Any) -> pa.Table:
    """Rows of any of the kinds as an Arrow table; a list of texts has the column `text`."""
    try:
        return _to_table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the data can't be read as a table: {one_line(error)}") from None


def _to_table(data: Any) -> pa.Table:
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, Mapping):
        return pa.table({name: _plain(values) for name, values in data.items()})
    library = type(data).__module__.partition(".")[0]
    if library == "pandas":
        frame = data.to_frame() if hasattr(data, "to_frame") else data
        table = pa.Table.from_pandas(frame, preserve_index=False)
        return table.replace_schema_metadata(None)
    if library == "datasets":  # its schema has the names of classes
        metadata = data.features.arrow_schema.metadata
        return data.with_format("arrow")[:].replace_schema_metadata(metadata)
    if hasattr(data, "iter_batches"):  # Ray's
        batches = data.iter_batches(batch_format="pyarrow", batch_size=None)
        return pa.concat_tables(list(batches), promote_options="permissive")
    if isinstance(data, Iterable):
        rows = list(data)
        if all(isinstance(row, str) for row in rows):
            return pa.table({"text": pa.array(rows, pa.string())})
        if all(isinstance(row, Mapping) for row in rows):
            names = dict.fromkeys(name for row in rows for name in row)
            return pa.table({name: _plain([row.get(name) for row in rows]) for name in names})
    raise TypeError(f"expected {_KINDS}, got {type(data).__name__}")


def _plain(values: Any) -> Any:
    """A column; values of several types, as 1 and "1", become strings."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence):
        return values
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
