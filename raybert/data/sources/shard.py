"""What listing a source and reading it have in common: files, shards of files, and rows.

A shard is a file, or several small ones, that one task reads. Shards are picklable and hold
addresses only, so any machine can read one.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from raybert.errors import DataError
from raybert.storage.folder import Folder

Purpose = Literal["corpus", "train", "evaluate"]

_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1 << 20
_SHARD_FILES, _SHARD_BYTES = 2000, 16 << 20  # of small files in one shard, at most


@dataclass(frozen=True)
class File:
    """A file's address."""

    name: str  # as the user wrote it, for messages
    uri: str  # opens on any machine
    size: int  # bytes
    mtime: int | None  # ns since 1970, where the filesystem has it

    @property
    def path(self) -> str:
        """The address without a URI's query."""
        return self.uri.partition("?")[0] if "://" in self.uri else self.uri

    def open_stream(self) -> Any:
        """Open for one pass, decompressed according to the suffix.

        Raises:
            DataError: the file is gone or can't be read.
        """
        compression = _COMPRESSIONS.get(posixpath.splitext(self.path.lower())[1])
        return self._open("open_input_stream", compression=compression, buffer_size=_BUFFER_BYTES)

    def open_seekable(self) -> Any:
        """Open for reads at any offset; raises as `open_stream`."""
        return self._open("open_input_file")

    def _open(self, method: str, **options: Any) -> Any:
        folder = Folder(self.uri)
        try:
            return getattr(folder.filesystem, method)(folder.path, **options)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.name}: can't be read: {error_text(error)}") from None


@dataclass(frozen=True)
class Shard:
    """Files that one task reads, one after the other."""

    reader: str  # a name that `formats.reader_of` knows
    files: tuple[File, ...]
    splits: tuple[str, ...] = ()  # to read, where the source has splits
    document: str = "line"  # what one document is, in plain text: line or file
    sources: tuple[str, ...] = ()  # which rows of the embedded sample belong to it


class Columns(NamedTuple):
    """Which columns to read; `label` is None where labels are not wanted."""

    text: str
    label: str | None


class Row(NamedTuple):
    """A row as a reader found it, not checked yet."""

    text: Any  # str, bytes (which may not be UTF-8), None, or any other value of the column
    label: Any
    place: str | None = None  # in the file, for messages: "row 7", "line 7" or a member's path
    problem: str | None = None  # why the row can't be used, where the reader itself finds out


def group_small_files(
    files: Iterable[tuple[str, File]], splits: tuple[str, ...], document: str
) -> Iterator[Shard]:
    """Put small files of one reader into one shard: a folder of 100,000 is not 100,000 tasks.

    Args:
        files: (reader, file) pairs; their order is kept.
        splits: of the shards.
        document: of the shards.
    """
    group: list[File] = []
    total, previous = 0, ""
    for reader, file in files:
        is_full = len(group) >= _SHARD_FILES or total >= _SHARD_BYTES
        if group and (is_full or reader != previous):
            yield Shard(previous, tuple(group), splits, document)
            group, total = [], 0
        group.append(file)
        total, previous = total + file.size, reader
    if group:
        yield Shard(previous, tuple(group), splits, document)


def error_text(error: BaseException) -> str:
    """The first line of an error's message, without Python's error number."""
    if isinstance(error, OSError) and error.errno and not error.strerror:
        return os.strerror(error.errno)
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
