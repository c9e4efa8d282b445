"""The output file of bulk predictions, JSONL or Parquet."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.errors import StorageError, UserError
from raybert.storage.folder import Folder


class PredictionWriter:
    """Writes predictions to a JSONL or Parquet file, which exists only once it is complete."""

    def __init__(self, path: str, names: list[str]) -> None:
        """Open a path or URI that ends in .jsonl or .parquet, for a classifier's labels.

        Raises:
            UserError: the name has another ending, or the folder can't be written.
        """
        self._folder, self._name = Folder.of_file(path)
        if not self._name.endswith((".jsonl", ".parquet")):
            raise UserError(f"--output {path}: name a .jsonl or a .parquet file")
        self._names = names
        self._unfinished = self._folder.join(f".{self._name}.unfinished")
        try:
            if self._folder.is_local:
                os.makedirs(self._folder.path, exist_ok=True)
            # On an object store a file exists once it is closed: it needs no temporary name.
            target = self._unfinished if self._folder.is_local else self._folder.join(self._name)
            self._stream = self._folder.filesystem.open_output_stream(target)
        except OSError as error:
            raise UserError(
                f"--output {path}: can't be written: {error.strerror or error}"
            ) from None
        self._parquet: pq.ParquetWriter | None = None

    def write(
        self, rows: list[int], texts: list[str], probabilities: npt.NDArray[np.float32]
    ) -> None:
        """Append texts with their row numbers, best label, its score and all labels' scores.

        `probabilities` are [texts, labels].

        Raises:
            StorageError: writing fails; the disk is full, for example.
        """
        best = probabilities.argmax(axis=1)
        records = [
            {
                "row": row,
                "text": text,
                "label": self._names[top],
                "score": float(scores[top]),
                "scores": {n: float(s) for n, s in zip(self._names, scores, strict=True)},
            }
            for row, text, top, scores in zip(rows, texts, best, probabilities, strict=True)
        ]
        if self._name.endswith(".jsonl"):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
            with self._folder.storage_errors("writing", self._folder.join(self._name)):
                self._stream.write(lines.encode())
            return
        table = pa.Table.from_pylist(records)
        with self._folder.storage_errors("writing", self._folder.join(self._name)):
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(self._stream, table.schema)
            self._parquet.write_table(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Complete the file; after an error, remove it."""
        if kind is not None:
            with suppress(OSError, StorageError):
                if self._parquet is not None:
                    self._parquet.close()
                self._stream.close()
                if not self._folder.is_local:  # closing has created it
                    self._folder.delete(self._name)
            if self._folder.is_local:
                self._folder.delete(f".{self._name}.unfinished")
            return
        with self._folder.storage_errors("writing", self._folder.join(self._name)):
            if self._parquet is not None:
                self._parquet.close()
            self._stream.close()
            if self._folder.is_local:
                os.replace(self._unfinished, self._folder.join(self._name))
