"""Parts: the Parquet files that hold a corpus's rows, and random access to them.

A part is ordinary Parquet, written uncompressed and plainly encoded with one page a column and row
group. So every row group has the same length in bytes, and where group g of part p lies is a
formula: one ranged read fetches it, without the footer, which at a billion rows would weigh more
than the data read. The manifest keeps the formula's constants and every part's size and checksum.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.config import Settings, build
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.storage.folder import Folder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

IntArray = npt.NDArray[np.int64]


class Layout(Settings):
    """Where the bytes of a row group lie; all offsets in bytes."""

    first: int  # of the first row group, from the start of the part
    stride: int  # from one row group to the next
    input_ids: int  # of the ids, from the start of the row group
    word_starts: int  # of the bit mask, from the start of the row group


class PartFile(Settings):
    """One part: its name in the corpus folder, its size in bytes, its checksum."""

    name: str
    rows: int
    bytes: int
    sha256: str


class SplitManifest(Settings):
    """The parts of one split. All but the last hold `rows_per_part` rows."""

    rows: int
    rows_per_part: int
    rows_per_group: int
    layout: Layout | None  # None where the split holds no whole row group
    tail: Layout | None  # of the last, shorter row group: its page headers may be shorter, too
    parts: list[PartFile]


class Manifest(Settings):
    """What a corpus is. Written last: a folder without it is no corpus."""

    format_version: int
    seq_len: int
    dtype: str  # of the stored ids: uint16 or uint32
    vocab_size: int
    tokenizer_hash: str
    splits: dict[str, SplitManifest]
    info: dict[str, Any] = {}

    @classmethod
    def read(cls, folder: Folder) -> Manifest:
        """Read a corpus's manifest.

        Raises:
            DataError: there is no corpus, or a newer raybert made it.
        """
        try:
            values = folder.read_json(MANIFEST)
        except FileNotFoundError:
            raise DataError(
                f"{folder}: no corpus here ({MANIFEST} is missing); make one with `raybert corpus`"
            ) from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(
                f"{folder}: the corpus has format {version}, this raybert reads up to "
                f"{FORMAT_VERSION}; upgrade raybert or make the corpus again"
            )
        try:
            return build(cls, values, folder.join(MANIFEST))
        except ConfigError as error:
            raise DamagedError(f"{error}; make the corpus again") from None

    @property
    def digest(self) -> str:
        """A hash of what was made; not of when, from which files or by whom."""
        made = self.model_dump(mode="json", exclude={"info"})
        # The unigram model's loss follows from every token of the training split.
        made["content"] = {key: self.info.get(key) for key in ("tokens", "unigram_loss")}
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class PartWriter:
    """Writes the rows of one split into parts of a fixed number of rows, in the order they come."""

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
        """Prepare to write; nothing is written before the first part is full.

        Raises:
            ConfigError: `rows_per_part` is not a multiple of `rows_per_group`.
        """
        if rows_per_part % rows_per_group:
            nearest = max(1, rows_per_part // rows_per_group) * rows_per_group
            raise ConfigError(
                f"corpus.rows_per_part={rows_per_part} is not a multiple of "
                f"corpus.rows_per_group={rows_per_group}; use {nearest}"
            )
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
        """Append rows: ids [n, seq_len], and where words start, bool [n, seq_len]."""
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
        """Write what is left as the last part and describe the split."""
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
        self._note_layout(data, len(ids), ids.shape[1] * ids.itemsize, starts.shape[1])
        name = f"{self._split}-{len(self._parts):05d}.parquet"
        self._folder.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._parts.append(PartFile(name=name, rows=len(ids), bytes=len(data), sha256=digest))

    def _note_layout(self, data: bytes, rows: int, ids_width: int, starts_width: int) -> None:
        """Read the row groups' offsets from the footer and prove that the formula gives them."""
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
                raise AssertionError(f"row group {index} lies at {begin}, not where expected")


def _binary(rows: npt.NDArray[Any]) -> pa.Array:
    """A column of fixed-size binary values, one a row, without copying."""
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(rows), [None, pa.py_buffer(rows)]
    )


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored: ids [n, T], and where words start, bool [n, T]."""

    input_ids: npt.NDArray[Any]
    word_starts: npt.NDArray[np.bool_]


class PartReader:
    """Random access to the row groups of a split. Picklable; opens files where it is used.

    Of the parts it keeps names and sizes. It travels to every task that reads a window, and ten
    thousand descriptions with their checksums are 1.4 MB, which take 40 ms to unpack.
    """

    _OPEN_FILES = 128
    _THREADS = 16  # object stores answer in tens of milliseconds: latency is hidden by overlap

    def __init__(self, folder: Folder, manifest: Manifest, split: str) -> None:
        """Describe a split of a corpus; nothing is opened yet."""
        self._folder, self._seq_len = folder, manifest.seq_len
        self._dtype = np.dtype(manifest.dtype)
        described = manifest.splits[split]
        self._split = described.model_copy(update={"parts": []})
        self._names = [part.name for part in described.parts]
        self._sizes = [part.bytes for part in described.parts]
        self._files: OrderedDict[int, pa.NativeFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_files": OrderedDict()}
        state.pop("_pool", None)
        return state

    @property
    def rows(self) -> int:
        """The number of rows in the split."""
        return self._split.rows

    @property
    def rows_per_group(self) -> int:
        """The number of rows in every row group but the last."""
        return self._split.rows_per_group

    def check(self) -> None:
        """Compare every part's size with the manifest.

        Raises:
            DamagedError: a part is missing or cut short.
        """
        sizes = self._folder.sizes()  # asking for one after the other takes minutes of round trips
        for name, expected in zip(self._names, self._sizes, strict=True):
            size = sizes.get(name)
            if size != expected:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DamagedError(
                    f"{self._folder.join(name)} {found}, its manifest says {expected:,}: "
                    "make the corpus again with `raybert corpus --force`"
                )

    def read_groups(self, groups: Iterable[int]) -> Rows:
        """Read row groups by their number in the split, in the order given."""
        wanted = list(groups)
        if self._folder.is_local or len(wanted) == 1:
            read = [self._read_group(group) for group in wanted]
        else:  # opening a file is a round trip, too, and nearly every group lies in another one
            read = list(self._pool.map(self._read_group, wanted))
        if not read:
            empty = np.empty((0, self._seq_len), self._dtype)
            return Rows(empty, np.empty(empty.shape, np.bool_))
        ids = np.concatenate([ids for ids, _ in read])
        packed = np.concatenate([starts for _, starts in read])
        starts = np.unpackbits(packed, axis=1, bitorder="little", count=self._seq_len)
        return Rows(ids, starts.view(np.bool_))

    def read_rows(self, row_ids: IntArray) -> Rows:
        """Read rows [n] by id, in the order given; each row group is fetched once."""
        per_group = self.rows_per_group
        groups, inverse = np.unique(np.asarray(row_ids) // per_group, return_inverse=True)
        rows = self.read_groups(groups.tolist())
        # Only the split's last group can be short, and it comes last, so full offsets hold.
        at = inverse * per_group + np.asarray(row_ids) % per_group
        return Rows(rows.input_ids[at], rows.word_starts[at])

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
            raise DamagedError(f"{name} is cut short: row group {within} is not all there")
        ids = np.frombuffer(data, self._dtype, count * self._seq_len, layout.input_ids)
        width = (self._seq_len + 7) // 8
        starts = np.frombuffer(data, np.uint8, count * width, layout.word_starts)
        return ids.reshape(count, self._seq_len), starts.reshape(count, width)

    def _open(self, part: int) -> pa.NativeFile:
        # In many threads at once: each operation on the files is atomic, and at worst one of them
        # is opened twice.
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
