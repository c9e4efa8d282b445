"""Files of a source, shards (files that one task reads), and the rows that readers yield."""

from __future__ import annotations

import functools
import io
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from raybert.data.sources.compression import DAMAGED, SUFFIXES, decompressed, take_head
from raybert.errors import DataError, one_line
from raybert.storage.folder import Folder

Purpose = Literal["corpus", "train", "evaluate"]

_BUFFER_BYTES = 1 << 20
_MEMBER_BYTES = 512 << 20  # of a Parquet file in an archive, at most: it is held in memory
_SHARD_FILES, _SHARD_BYTES = 2000, 16 << 20  # of small files in one shard, at most
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # how Hive and Spark write a missing value
#: What `zipfile` raises for archives that are damaged, encrypted or of an unknown method.
ZIP_ERRORS = (
    zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError,
    OverflowError, LookupError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A file's address."""

    name: str  # as the user wrote it, for messages
    uri: str  # opens on any machine
    size: int  # bytes
    mtime: int | None  # ns since 1970, where the filesystem has it
    member: str | None = None  # the file's path in the zip archive at `uri`
    label: str | None = None  # the label of all its rows: its folder's name, where that is one

    @property
    def path(self) -> str:
        """The address without a URI's query; of a member, with its path in the archive."""
        path = self.uri.partition("?")[0] if "://" in self.uri else self.uri
        return path if self.member is None else f"{path}/{self.member}"

    @property
    def suffix(self) -> str:
        """The lower-case suffix, without that of a compression."""
        stem, suffix = posixpath.splitext(posixpath.basename(self.path).lower())
        return posixpath.splitext(stem)[1] if suffix in SUFFIXES else suffix

    @property
    def partition(self) -> dict[str, str | None]:
        """The columns that are in the path, as Hive and Spark write them: `label=pos/part-0`."""
        pairs = (part.partition("=") for part in self.path.split("/")[:-1] if "=" in part)
        found = {unquote(key): unquote(value) for key, _, value in pairs}
        return {key: None if v == _NULL_PARTITION else v for key, v in found.items()}

    def open_stream(self) -> Any:
        """Open for one pass, decompressed; a DataError if it can't be read."""
        # Arrow would go by the suffix.
        raw = self._open("open_input_stream", compression=None, buffer_size=_BUFFER_BYTES)
        try:
            return decompressed(raw)
        except DAMAGED as error:
            raise DataError(f"{self.name}: can't be read: {one_line(error)}") from None

    def open_seekable(self) -> Any:
        """Open for reads at any offset; raises as `open_stream`."""
        opened = self._open("open_input_file")
        if self.member is None:
            return opened
        if self.size > _MEMBER_BYTES:
            raise DataError(f"{self.name}: has {self.size:,} bytes; unpack the archive")
        try:  # a compressed member can't be read at any offset
            content = take_head(opened, _MEMBER_BYTES + 1)
        except DAMAGED as error:
            raise DataError(f"{self.name}: can't be read: {one_line(error)}") from None
        return io.BytesIO(content)

    def _open(self, method: str, **options: Any) -> Any:
        try:
            if self.member is not None:
                return open_zip(self).open(self.member)
            folder = Folder(self.uri)
            return getattr(folder.filesystem, method)(folder.path, **options)
        except (*ZIP_ERRORS, pa.ArrowException) as error:
            raise DataError(f"{self.name}: can't be read: {one_line(error)}") from None


@functools.lru_cache(maxsize=2)
def _open_zip(uri: str, size: int, mtime: int | None) -> zipfile.ZipFile:
    folder = Folder(uri)
    return zipfile.ZipFile(folder.filesystem.open_input_file(folder.path))


def open_zip(file: File) -> zipfile.ZipFile:
    """Open a zip archive, or the one that a member is in; raises `ZIP_ERRORS`."""
    # Kept open: reading its directory once for each of 100,000 members takes hours.
    return _open_zip(file.uri, file.size, file.mtime)


class ReadOptions(NamedTuple):
    """How text and tables are written; None: found out by `dialect` and `opening`."""

    delimiter: str | None = None
    quote: str | None = None  # "": fields are not quoted
    escape: str | None = None  # "": nothing is escaped
    encoding: str | None = None
    has_header: bool | None = None


DETECTED = ReadOptions()


@dataclass(frozen=True)
class Shard:
    """Files that one task reads, one after the other; only addresses, for any machine."""

    reader: str  # a name that `formats.reader_of` knows
    files: tuple[File, ...]
    splits: tuple[str, ...] = ()  # to read, where the source has splits
    document: str = "line"  # what one document is, in plain text: line or file
    sources: tuple[str, ...] = ()  # which rows of the embedded sample belong to it
    options: ReadOptions = DETECTED  # how its files are read, where that is configured
    rows: bytes | None = None  # int64: the numbers of the rows to read; None: all of them


class Row(NamedTuple):
    """A row as a reader found it, not checked yet."""

    text: Any  # str, bytes (which may not be UTF-8), None, or any other value of the column
    label: Any  # the label column's value; of several columns, a value for each name
    place: str | None = None  # in the file, for messages: "row 7", "line 7" or a member's path
    problem: str | None = None  # why the row can't be used, where the reader itself finds out
    others: tuple[Any, ...] = ()  # values of `Columns.others`
    kept: tuple[Any, ...] = ()  # values of `Columns.kept`


def group_small_files(
    files: Iterable[tuple[str, File]],
    splits: tuple[str, ...],
    document: str,
    options: ReadOptions = DETECTED,
) -> Iterator[Shard]:
    """Put small files of one reader, (reader, file) pairs, into shards, in their order."""
    group: list[File] = []
    total, previous = 0, ""
    for reader, file in files:
        is_full = len(group) >= _SHARD_FILES or total >= _SHARD_BYTES
        if group and (is_full or reader != previous):
            yield Shard(previous, tuple(group), splits, document, options=options)
            group, total = [], 0
        group.append(file)
        total, previous = total + file.size, reader
    if group:
        yield Shard(previous, tuple(group), splits, document, options=options)
