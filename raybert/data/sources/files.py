"""The files of a path, a folder, a glob or a URI, and shards: files that one task reads.

One recursive request of pyarrow lists a folder. fsspec's `glob` over `ArrowFSWrapper` is not used:
it sends one request per folder (201 for 20,000 files in 200 folders, in 0.27 s of CPU rather than
0.05 s), and it returns times in microseconds, while a corpus stores its sources' modification times
in nanoseconds and compares them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from raybert.errors import DataError, one_line
from raybert.storage.folder import Folder

Purpose = Literal["corpus", "train", "evaluate"]

_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1 << 20
# `**` as a part of a name, which fsspec does not accept: `a**b` is `a*b` or `a*/**/*b`.
_PARTIAL_DOUBLE_STAR = re.compile(r"(?<=[^/*])\*\*|\*\*(?=[^/*])")
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
        """Open for one pass, decompressed by its suffix; a DataError if it can't be read."""
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
            raise DataError(f"{self.name}: can't be read: {one_line(error)}") from None


@dataclass(frozen=True)
class Shard:
    """Files that one task reads, one after the other; only addresses, for any machine."""

    reader: str  # a name that `formats.reader_of` knows
    files: tuple[File, ...]
    splits: tuple[str, ...] = ()  # to read, where the source has splits
    document: str = "line"  # what one document is, in plain text: line or file
    sources: tuple[str, ...] = ()  # which rows of the embedded sample belong to it


class Row(NamedTuple):
    """A row as a reader found it, not checked yet."""

    text: Any  # str, bytes (which may not be UTF-8), None, or any other value of the column
    label: Any  # the label column's value; of several columns, a value for each name
    place: str | None = None  # in the file, for messages: "row 7", "line 7" or a member's path
    problem: str | None = None  # why the row can't be used, where the reader itself finds out
    others: tuple[Any, ...] = ()  # values of `Columns.others`


class Columns(NamedTuple):
    """Which columns to read; `label` is None where labels are not wanted."""

    text: str
    label: str | tuple[str, ...] | None = None
    others: Mapping[str, str] = {}  # columns by what they are: pair, group

    def keys(self) -> dict[str, str]:
        """The setting that names each column."""
        labels = (self.label,) if isinstance(self.label, str) else self.label or ()
        others = {column: f"{name}_column" for name, column in self.others.items()}
        return {self.text: "text_column", **others, **dict.fromkeys(labels, "label_column")}

    def row(self, cell: Callable[[str], Any], place: str) -> Row:
        """Make a row of cells by the names of their columns."""
        label = self.label
        if isinstance(label, tuple):
            value: Any = {name: cell(name) for name in label}
        else:
            value = None if label is None else cell(label)
        others = tuple(map(cell, self.others.values()))
        return Row(cell(self.text), value, place, None, others)


def group_small_files(
    files: Iterable[tuple[str, File]], splits: tuple[str, ...], document: str
) -> Iterator[Shard]:
    """Put small files of one reader, (reader, file) pairs, into shards, in their order."""
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


def list_files(path: str) -> tuple[list[File], str | None]:
    """List the files of a configured path, and the folder that holds them, None for one file.

    Names that begin with a dot or an underscore are left out. A DataError if nothing is there, a
    glob matches nothing, or the storage can't be listed.
    """
    is_uri = "://" in path
    wildcards = "*[" if is_uri else "*?["  # in a URI, ? begins the query
    is_glob = any(character in path for character in wildcards)
    if not (is_uri and is_glob):  # a local file may have brackets in its name
        folder = Folder(path)
        info = _info(folder, path)
        if info.type == pafs.FileType.File:
            return [File(path, folder.uri, info.size, info.mtime_ns)], None
        if info.type == pafs.FileType.Directory:
            return _walk(folder, path, lambda relative: True), path
    if not is_glob:
        raise DataError(f"{path}: no such file or folder")
    base, pattern = _split_glob(path, wildcards)
    folder = Folder(base or ".")
    if _info(folder, base).type != pafs.FileType.Directory:
        raise DataError(f"{path}: no such folder: {base}")
    found = _walk(folder, base, _matcher(pattern))
    if not found:
        raise DataError(f"{path}: no file matches")
    return found, base


def _walk(folder: Folder, shown: str, matches: Callable[[str], bool]) -> list[File]:
    """List the files below a folder whose path from there matches, named after `shown`."""
    infos = _info(folder, shown, pafs.FileSelector(folder.path, recursive=True))
    shown = shown.partition("?")[0] if "://" in shown else shown
    found = []
    for info in infos:
        if info.type != pafs.FileType.File:
            continue
        relative = info.path[len(folder.path) :].lstrip("/")
        is_hidden = any(part.startswith((".", "_")) for part in relative.split("/"))
        if not is_hidden and matches(relative):
            name = f"{shown.rstrip('/')}/{relative}" if shown else relative
            found.append(File(name, (folder / relative).uri, info.size, info.mtime_ns))
    return sorted(found, key=lambda file: file.uri)


def _info(folder: Folder, shown: str, selector: pafs.FileSelector | None = None) -> Any:
    """The information about a folder, or on the files that a selector selects."""
    try:
        return folder.filesystem.get_file_info(selector or folder.path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown}: can't be read: {one_line(error)}") from None


def _split_glob(path: str, wildcards: str) -> tuple[str, str]:
    """Split a glob into the folder before the first wildcard and the pattern from there on."""
    at = min(path.index(c) for c in wildcards if c in path)
    slash = path.rfind("/", 0, at) + 1
    query = ""
    if "://" in path:
        path, mark, rest = path.partition("?")
        query = mark + rest
    return path[:slash] + query, path[slash:]


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path matches a glob: `*` and `?` match inside a name, `**` crosses folders."""
    spellings = {_PARTIAL_DOUBLE_STAR.sub(stars, pattern) for stars in ("*", "*/**/*")}
    expressions = [re.compile(glob_translate(spelling)) for spelling in spellings]
    return lambda path: any(expression.fullmatch(path) for expression in expressions)
