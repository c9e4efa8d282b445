"""Write the rows of a split into parts, Parquet files of a regular layout, and read them at random.

A part is ordinary Parquet, written uncompressed and plainly encoded with one page per column and
row group. So every row group has the same length in bytes, and the place of group g of part p is a
formula: one ranged read fetches it, without the footer, which at a billion rows would be larger
than the data read. The manifest holds the formula's constants and every part's size and checksum.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.corpus.manifest import Layout, Manifest, PartFile, SplitManifest
from raybert.data.encoding import id_dtype
from raybert.data.keyed import I64
from raybert.errors import ConfigError, DamagedError
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
        suffix: str = "",
        before_part: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up; parts' names end in `suffix`; `before_part` is called before each is written."""
        check_row_groups(rows_per_part, rows_per_group)
        self._folder, self._split, self._seq_len = folder, split, seq_len
        self._suffix, self._before_part = suffix, before_part
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
        self._record_layout(data, ids.shape[1] * ids.itemsize, starts.shape[1])
        name = f"{self._split}-{len(self._parts):05d}{self._suffix}.parquet"
        self._before_part()
        self._folder.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._parts.append(PartFile(name=name, rows=len(ids), bytes=len(data), sha256=digest))

    def _record_layout(self, data: bytes, ids_width: int, starts_width: int) -> None:
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
    """Raise ConfigError unless parts hold full row groups."""
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


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored."""

    input_ids: npt.NDArray[Any]  # [n, T], uint16 or uint32
    word_starts: npt.NDArray[np.bool_]  # [n, T], True where a word starts


class PartReader:
    """Reads the row groups of a split. Picklable; opens files in the process that reads.

    It keeps only the names and sizes of the parts, because it is sent to every task that reads a
    window: ten thousand descriptions with their checksums are 1.4 MB and take 40 ms to unpickle.
    """

    _OPEN_FILES = 128
    _THREADS = 16  # requests to an object store take tens of milliseconds each; overlap hides them

    def __init__(self, folder: Folder, manifest: Manifest, split: str) -> None:
        self._folder, self._seq_len = folder, manifest.seq_len
        self._dtype, self._vocab_size = np.dtype(manifest.dtype), manifest.vocab_size
        described = manifest.splits[split]
        self._split = described.model_copy(update={"parts": []})
        self.rows, self.rows_per_group = described.rows, described.rows_per_group
        self._names = [part.name for part in described.parts]
        self._sizes = [part.bytes for part in described.parts]
        self._files: OrderedDict[int, pa.NativeFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_files": OrderedDict()}
        state.pop("_pool", None)
        return state

    def check(self) -> None:
        """Raise DamagedError if a part is missing or has another size than in the manifest."""
        sizes = self._folder.sizes()  # one listing: a request per part would take minutes
        for name, expected in zip(self._names, self._sizes, strict=True):
            size = sizes.get(name)
            if size != expected:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DamagedError(
                    f"{self._folder.join(name)} {found}, its manifest says {expected:,}: "
                    "make the corpus again with `raybert corpus --force`"
                )

    def read_rows(self, row_ids: I64) -> Rows:
        """Read rows by their ids [n], in the order given; each row group is fetched once."""
        if not len(row_ids):
            empty = np.empty((0, self._seq_len), self._dtype)
            return Rows(empty, np.empty(empty.shape, np.bool_))
        per_group = self.rows_per_group
        groups, inverse = np.unique(row_ids // per_group, return_inverse=True)
        if self._folder.is_local or len(groups) == 1:
            read = [self._read_group(group) for group in groups.tolist()]
        else:  # opening a file is a request, too, and nearly every group is in another file
            read = list(self._pool.map(self._read_group, groups.tolist()))
        # Only the split's last group can be short, and it is the last of `groups`, so the offsets
        # of full groups hold.
        at = inverse * per_group + row_ids % per_group
        ids, packed = (np.concatenate(arrays)[at] for arrays in zip(*read, strict=True))
        if int(ids.max()) >= self._vocab_size:
            raise DamagedError(
                f"{self._folder}: a row has the id {int(ids.max()):,}, and the vocabulary has "
                f"{self._vocab_size:,} tokens; make the corpus again with `raybert corpus --force`"
            )
        starts = np.unpackbits(packed, axis=1, bitorder="little", count=self._seq_len)
        return Rows(ids, starts.view(np.bool_))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._THREADS)

    def _read_group(self, group: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        split, first_row = self._split, group * self.rows_per_group
        count = min(self.rows_per_group, split.rows - first_row)
        layout = split.layout if count == self.rows_per_group else split.tail
        if layout is None or count <= 0:
            raise IndexError(f"row group {group} of {split.rows} rows")
        part = first_row // split.rows_per_part
        within = (first_row - part * split.rows_per_part) // self.rows_per_group
        stride = split.layout.stride if split.layout else 0
        name = self._folder.join(self._names[part])
        file = self._open(part)
        with self._folder.storage_errors("reading", name):
            data = file.read_at(layout.stride, layout.first + within * stride)
        if len(data) < layout.stride:
            raise DamagedError(f"{name} is cut short: row group {within} is incomplete")
        ids = np.frombuffer(data, self._dtype, count * self._seq_len, layout.input_ids)
        width = (self._seq_len + 7) // 8
        starts = np.frombuffer(data, np.uint8, count * width, layout.word_starts)
        return ids.reshape(count, self._seq_len), starts.reshape(count, width)

    def _open(self, part: int) -> pa.NativeFile:
        # Several threads may be here: each operation on the dictionary is atomic, and at worst a
        # file is opened twice.
        file = self._files.get(part)
        if file is None:
            name = self._names[part]
            try:
                file = self._folder.open_input(name)
            except FileNotFoundError:
                raise DamagedError(f"{self._folder.join(name)} is missing") from None
            self._files[part] = file
            while len(self._files) > self._OPEN_FILES:
                self._files.popitem(last=False)
        return file
