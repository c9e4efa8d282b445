"""Write the rows of a split into parts, which are Parquet files of a regular layout.

A part is ordinary Parquet, written uncompressed and plainly encoded with one page per column and
row group. So every row group has the same length in bytes, and the place of group g of part p is a
formula: one ranged read fetches it, without the footer, which at a billion rows would be larger
than the data read. The manifest holds the formula's constants and every part's size and checksum.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.corpus.manifest import Layout, PartFile, SplitManifest
from raybert.data.encoding import id_dtype
from raybert.errors import ConfigError
from raybert.storage.folder import Folder


class PartWriter:
    """Writes the rows of one split into parts of a fixed number of rows, in the order given."""

    def __init__(
        self,
        folder: Folder,
        split: str,
        *,
        seq_len: int,
        vocab_size: int,
        rows_per_part: int,
        rows_per_group: int,
    ) -> None:
        """Prepare to write; the first part is written when it is full.

        Raises:
            ConfigError: `rows_per_part` is not a multiple of `rows_per_group`.
        """
        check_row_groups(rows_per_part, rows_per_group)
        self._folder, self._split, self._seq_len = folder, split, seq_len
        self._dtype = id_dtype(vocab_size)
        self._rows_per_part, self._rows_per_group = rows_per_part, rows_per_group
        self._ids: list[npt.NDArray[Any]] = []
        self._starts: list[npt.NDArray[np.uint8]] = []
        self._pending = 0
        self._parts: list[PartFile] = []
        self._layout: Layout | None = None
        self._tail: Layout | None = None

    def append(self, input_ids: npt.NDArray[Any], word_starts: npt.NDArray[np.bool_]) -> None:
        """Append rows: ids and word starts (bool), [n, seq_len] each."""
        self._ids.append(np.ascontiguousarray(input_ids, dtype=self._dtype))
        self._starts.append(np.packbits(word_starts, axis=1, bitorder="little"))
        self._pending += len(input_ids)
        if self._pending >= self._rows_per_part:
            ids, starts = np.concatenate(self._ids), np.concatenate(self._starts)
            whole = self._pending - self._pending % self._rows_per_part
            for begin in range(0, whole, self._rows_per_part):
                end = begin + self._rows_per_part
                self._write_part(ids[begin:end], starts[begin:end])
            # Copies, so that the written rows' memory is released.
            self._ids, self._starts = [ids[whole:].copy()], [starts[whole:].copy()]
            self._pending -= whole

    def close(self) -> SplitManifest:
        """Write the remaining rows as the last part and describe the split."""
        if self._pending:
            self._write_part(np.concatenate(self._ids), np.concatenate(self._starts))
            self._ids, self._starts, self._pending = [], [], 0
        return SplitManifest(
            rows=sum(part.rows for part in self._parts),
            rows_per_part=self._rows_per_part,
            rows_per_group=self._rows_per_group,
            layout=self._layout,
            tail=self._tail,
            parts=self._parts,
        )

    def _write_part(self, ids: npt.NDArray[Any], starts: npt.NDArray[np.uint8]) -> None:
        columns = {"input_ids": _binary(ids), "word_starts": _binary(starts)}
        schema = pa.schema(
            [pa.field(name, column.type, nullable=False) for name, column in columns.items()],
            metadata={
                "input_ids": f"{self._seq_len} little-endian {self._dtype.name}",
                "word_starts": f"{self._seq_len} bits, least significant first",
            },
        )
        sink = io.BytesIO()
        pq.write_table(
            pa.table(columns, schema=schema),
            sink,
            row_group_size=self._rows_per_group,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            column_encoding="PLAIN",
            data_page_size=1 << 30,
            store_schema=False,
        )
        data = sink.getvalue()
        self._record_layout(data, len(ids), ids.shape[1] * ids.itemsize, starts.shape[1])
        name = f"{self._split}-{len(self._parts):05d}.parquet"
        self._folder.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._parts.append(PartFile(name=name, rows=len(ids), bytes=len(data), sha256=digest))

    def _record_layout(self, data: bytes, rows: int, ids_width: int, starts_width: int) -> None:
        """Read the row groups' offsets from the footer and check that the formula yields them."""
        metadata = pq.read_metadata(io.BytesIO(data))
        first = metadata.row_group(0).column(0).data_page_offset
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            count = group.num_rows
            ids, starts = group.column(0), group.column(1)
            begin = ids.data_page_offset
            layout = Layout(
                first=first,
                stride=ids.total_compressed_size + starts.total_compressed_size,
                input_ids=ids.total_compressed_size - count * ids_width,
                word_starts=starts.data_page_offset
                - begin
                + starts.total_compressed_size
                - count * starts_width,
            )
            if count < self._rows_per_group:
                self._tail = layout
            elif self._layout is None:
                self._layout = layout
            elif layout != self._layout:
                raise AssertionError(f"row groups of unequal length: {layout} != {self._layout}")
            stride = self._layout.stride if self._layout else 0
            if begin != first + index * stride:
                raise AssertionError(
                    f"row group {index} begins at byte {begin}, not where expected"
                )


def check_row_groups(rows_per_part: int, rows_per_group: int) -> None:
    """Check that parts hold full row groups.

    Raises:
        ConfigError: `rows_per_part` is not a multiple of `rows_per_group`.
    """
    if rows_per_part % rows_per_group:
        nearest = max(1, rows_per_part // rows_per_group) * rows_per_group
        raise ConfigError(
            f"corpus.rows_per_part={rows_per_part} is not a multiple of "
            f"corpus.rows_per_group={rows_per_group}; use {nearest}"
        )


def _binary(rows: npt.NDArray[Any]) -> pa.Array:
    """A column of fixed-size binary values, one per row, without copying."""
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(rows), [None, pa.py_buffer(rows)]
    )
