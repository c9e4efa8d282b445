"""Random access to the rows of a split, by the formula that `part_writer` describes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.data.corpus.manifest import Manifest
from raybert.data.keyed import I64
from raybert.errors import DamagedError
from raybert.storage.folder import Folder


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored."""

    input_ids: npt.NDArray[Any]  # [n, T], uint16 or uint32
    word_starts: npt.NDArray[np.bool_]  # [n, T], True where a word starts


class PartReader:
    """Reads the row groups of a split. Picklable; opens files in the process that reads.

    It keeps only the names and sizes of the parts, because it travels to every task that reads a
    window: ten thousand descriptions with their checksums are 1.4 MB and take 40 ms to unpickle.
    """

    _OPEN_FILES = 128
    _THREADS = 16  # requests to an object store take tens of milliseconds each; overlap hides them

    def __init__(self, folder: Folder, manifest: Manifest, split: str) -> None:
        """Prepare to read a split of a corpus; opens no file."""
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
        """The number of rows in every row group except the last."""
        return self._split.rows_per_group

    def check(self) -> None:
        """Compare every part's size with the manifest.

        Raises:
            DamagedError: a part is missing or cut short.
        """
        sizes = self._folder.sizes()  # one listing: a request per part would take minutes
        for name, expected in zip(self._names, self._sizes, strict=True):
            size = sizes.get(name)
            if size != expected:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DamagedError(
                    f"{self._folder.join(name)} {found}, its manifest says {expected:,}: "
                    "make the corpus again with `raybert corpus --force`"
                )

    def read_groups(self, groups: Iterable[int]) -> Rows:
        """Read row groups by their numbers in the split, in the order given."""
        wanted = list(groups)
        if self._folder.is_local or len(wanted) == 1:
            read = [self._read_group(group) for group in wanted]
        else:  # opening a file is a request, too, and nearly every group is in another file
            read = list(self._pool.map(self._read_group, wanted))
        if not read:
            empty = np.empty((0, self._seq_len), self._dtype)
            return Rows(empty, np.empty(empty.shape, np.bool_))
        ids = np.concatenate([ids for ids, _ in read])
        packed = np.concatenate([starts for _, starts in read])
        starts = np.unpackbits(packed, axis=1, bitorder="little", count=self._seq_len)
        return Rows(ids, starts.view(np.bool_))

    def read_rows(self, row_ids: I64) -> Rows:
        """Read rows by their ids [n], in the order given; each row group is fetched once."""
        per_group = self.rows_per_group
        groups, inverse = np.unique(np.asarray(row_ids) // per_group, return_inverse=True)
        rows = self.read_groups(groups.tolist())
        # Only the split's last group can be short, and it is the last of `groups`, so the offsets
        # of full groups hold.
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
