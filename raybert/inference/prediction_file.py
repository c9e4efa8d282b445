"""Write predictions to a file: JSON lines, CSV or Parquet, by its suffix."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from raybert.errors import StorageError, UserError, one_line
from raybert.records import finite
from raybert.storage.folder import Folder
from raybert.storage.staged import staged_file

if TYPE_CHECKING:  # it imports PyTorch, and a path is checked before that
    from raybert.tasks.protocol import TextTask

_GIVEN_TYPES = {"row": pa.int64(), "text": pa.string(), "pair": pa.string()}


class _Rows(Protocol):
    """Writes rows in one format."""

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""

    def close(self) -> None:
        """Write what follows the last row."""


class _JsonLines:
    def __init__(self, stream: Any, schema: pa.Schema) -> None:
        self._stream = stream

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        lines = (json.dumps(finite(row), ensure_ascii=False) + "\n" for row in records)
        self._stream.write("".join(lines).encode())

    def close(self) -> None:
        pass


class _Csv:
    def __init__(self, stream: Any, schema: pa.Schema) -> None:
        self._stream, self._names = stream, schema.names
        self._write([self._names])

    def _write(self, rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._stream.write(text.getvalue().encode())

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._write([[_csv_cell(row.get(name)) for name in self._names] for row in records])

    def close(self) -> None:
        pass


def _csv_cell(value: Any) -> Any:
    if isinstance(value, dict | list | bool):
        return json.dumps(finite(value), ensure_ascii=False)
    return value


class _Parquet:
    def __init__(self, stream: Any, schema: pa.Schema) -> None:
        self._schema, self._writer = schema, pq.ParquetWriter(stream, schema)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        rows = [
            {field.name: _typed(row.get(field.name), field) for field in self._schema}
            for row in records
        ]
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _typed(value: Any, field: pa.Field) -> Any:
    """A value for a column of strings, which columns of mixed types are."""
    if value is None or isinstance(value, str) or not pa.types.is_string(field.type):
        return value
    return json.dumps(value, ensure_ascii=False)


_FORMATS: dict[str, Callable[[Any, pa.Schema], _Rows]] = {
    ".jsonl": _JsonLines, ".csv": _Csv, ".parquet": _Parquet,
}  # fmt: skip
_COMPRESSED = ".gz"


def check_output(path: str) -> None:
    """Raise a UserError for a path that predictions can't be written to."""
    folder, name = Folder.of_file(path)
    _format_of(path, name)
    if not folder.is_local:
        return
    if os.path.isdir(folder.join(name)):
        raise UserError(f"--output {path}: is a folder; name a file in it")
    above = folder.path
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise UserError(f"--output {path}: can't be written: {above} is a file")
    try:  # permissions say nothing of what is mounted there
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise UserError(f"--output {path}: can't be written: {one_line(error)}: {above}") from None


def _format_of(path: str, name: str) -> Callable[[Any, pa.Schema], _Rows]:
    lower = name.lower().removesuffix(_COMPRESSED)
    found = _FORMATS.get(os.path.splitext(lower)[1])
    if found is None or (found is _Parquet and name.lower().endswith(_COMPRESSED)):
        raise UserError(
            f"--output {path}: name a .jsonl, a .csv or a .parquet file; .gz may follow the first "
            "two"
        )
    return found


class PredictionWriter:
    """Writes predictions to a file, which exists only once it is complete."""

    def __init__(
        self,
        path: str,
        given: Sequence[str],
        task: TextTask,
        kept: Mapping[str, pa.DataType] | None = None,
    ) -> None:
        """Open a path or URI (else a UserError).

        Its columns are `given`, among row, text and pair, those of the source that are `kept`, with
        their types, and those of the task.
        """
        self._folder, self._name = Folder.of_file(path)
        new_rows = _format_of(path, self._name)
        schema = pa.schema(
            [
                *((name, _GIVEN_TYPES[name]) for name in given),
                *(kept or {}).items(),
                *task.column_types(),
            ]
        )
        self._exits = ExitStack()
        try:
            stream: Any = self._exits.enter_context(staged_file(self._folder, self._name))
        except (OSError, StorageError) as error:
            raise UserError(f"--output {path}: can't be written: {one_line(error)}") from None
        if self._name.lower().endswith(_COMPRESSED):
            compressed = gzip.GzipFile(fileobj=stream, mode="wb", filename="", mtime=0)
            stream = self._exits.enter_context(compressed)
        with self._errors():
            self._rows = new_rows(stream, schema)

    def _errors(self) -> AbstractContextManager[None]:
        return self._folder.storage_errors("writing", self._folder.join(self._name))

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""
        with self._errors():
            self._rows.write(records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the file, which replaces one of its name; after an error, leave that one."""
        if kind is None:
            with self._errors(), self._exits.pop_all():
                self._rows.close()
            return
        with suppress(OSError, ValueError, pa.ArrowException):  # the end of a file that goes
            self._rows.close()
        with suppress(OSError, ValueError):
            self._exits.pop_all().__exit__(kind, error, trace)
