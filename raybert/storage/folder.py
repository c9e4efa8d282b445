"""A folder at any path or URI that pyarrow's filesystems read: local, `s3://`, `gs://`, `hdfs://`.

Object stores neither append nor rename, so nothing here offers either: a file is written whole, and
on a local disk it appears whole.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs

from raybert.errors import DamagedError, StorageError, UserError, one_line
from raybert.storage.address import check_address, open_filesystem, split_query


class File(NamedTuple):
    """A file at any depth of a folder."""

    name: str  # its path relative to the folder
    bytes: int
    changed: float  # Unix time, seconds


class Folder:
    """A folder of files, by name. Picklable: it is sent to workers as its URI."""

    def __init__(self, uri: str | Path) -> None:
        """Open a local path or a URI.

        Raises:
            UserError: the URI's scheme or bucket can't be opened, or it holds credentials.
        """
        address = os.fspath(uri)
        self._fs, self.path = open_filesystem(address)
        self._base, self._query = split_query(address)

    @classmethod
    def of_file(cls, address: str) -> tuple[Folder, str]:
        """The folder that a file is in, and the file's name.

        Raises:
            UserError: as for a folder, or the address is that of a bucket.
        """
        check_address(address)
        base, query = split_query(address)
        parent, slash, name = base.rpartition("/")
        if parent.endswith(":/"):
            raise UserError(f"{address}: names a bucket; name a file in it")
        folder = cls((parent or slash or ".") + (f"?{query}" if query else ""))
        return folder, unquote(name) if "://" in address else name

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.uri,)

    def __truediv__(self, name: str) -> Folder:
        if self.is_local:
            return Folder(f"{self.path.rstrip('/')}/{name}")
        return Folder(f"{self._base.rstrip('/')}/{quote(name)}" + self._query_part)

    def __str__(self) -> str:
        return str(self.path) if self.is_local else self._base

    @property
    def uri(self) -> str:
        """The address under which another process opens the same folder."""
        return str(self.path) if self.is_local else self._base + self._query_part

    @property
    def _query_part(self) -> str:
        return f"?{self._query}" if self._query else ""

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a local filesystem."""
        return isinstance(self._fs, pafs.LocalFileSystem)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem that reads it."""
        return self._fs

    def join(self, name: str) -> str:
        """The path of `name` on `filesystem`."""
        return f"{self.path.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name."""
        path = self.join(name) if name else self.path
        with self.storage_errors("looking up", path):
            return bool(self._fs.get_file_info(path).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None where there is none."""
        with self.storage_errors("looking up", self.join(name)):
            info = self._fs.get_file_info(self.join(name))
        return int(info.size) if info.type == pafs.FileType.File else None

    def names(self, name: str = "", *, hidden: bool = False) -> list[str]:
        """The sorted names of the files and folders directly inside; empty where there is none."""
        found = [info.base_name for info in self._listed(name)]
        return sorted(name for name in found if hidden or not name.startswith("."))

    def sizes(self) -> dict[str, int]:
        """The sizes in bytes of the files directly inside, by name, from one listing."""
        files = (info for info in self._listed() if info.type == pafs.FileType.File)
        return {info.base_name: int(info.size) for info in files}

    def _listed(self, name: str = "") -> list[pafs.FileInfo]:
        path = self.join(name) if name else self.path
        selector = pafs.FileSelector(path, allow_not_found=True)
        with self.storage_errors("listing", path):
            try:
                infos = self._fs.get_file_info(selector)
            except FileNotFoundError:  # the folder was created just while Arrow looked for it
                infos = self._fs.get_file_info(selector)
        return list(infos)

    def files(self) -> list[File]:
        """Every file inside, at any depth and hidden or not, by name."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with self.storage_errors("listing", self.path):
            infos = self._fs.get_file_info(selector)
        base = self.join("")
        return sorted(
            File(info.path.removeprefix(base), info.size or 0, (info.mtime_ns or 0) / 1e9)
            for info in infos
            if info.type == pafs.FileType.File
        )

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: no file of that name.
            StorageError: the storage does not answer.
        """
        with self.storage_errors("reading", self.join(name)):
            with self._fs.open_input_stream(self.join(name)) as stream:
                return bytes(stream.read())

    def read_text(self, name: str) -> str:
        """Read a whole file as UTF-8."""
        return self.read_bytes(name).decode("utf-8")

    def read_json(self, name: str) -> Any:
        """Read a JSON file; DamagedError if it is not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise DamagedError(f"{self.join(name)} is damaged: it is not JSON ({error})") from None

    def open_input(self, name: str) -> pa.NativeFile:
        """Open a file for reads at any offset (`read_at`, safe from several threads)."""
        with self.storage_errors("opening", self.join(name)):
            return self._fs.open_input_file(self.join(name))

    def write_bytes(self, name: str, data: bytes | memoryview | Sequence[memoryview]) -> None:
        """Write a file, given whole or in pieces; no reader ever sees a part of it."""
        pieces: Sequence[bytes | memoryview]
        pieces = [data] if isinstance(data, bytes | memoryview) else data
        path = self.join(name)
        with self.storage_errors("writing", path):
            if self.is_local:
                _write_local(Path(path), pieces)
            else:
                with self._fs.open_output_stream(path) as stream:
                    for piece in pieces:
                        stream.write(piece)

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file; no reader ever sees a part of it."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, indented; no reader ever sees a part of it."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy_to(self, other: Folder, *, last: str) -> None:
        """Copy the files directly inside; `last` is copied last, so that it marks a whole copy."""
        files = [name for name in self.names() if self.size(name) is not None]
        for name in sorted(files, key=lambda name: (name == last, name)):
            other.write_bytes(name, self.read_bytes(name))

    def delete(self, name: str) -> None:
        """Delete a file or a folder with its contents, if there is one."""
        path = self.join(name)
        with self.storage_errors("deleting", path):
            info = self._fs.get_file_info(path)
            with suppress(FileNotFoundError):  # another process has deleted it
                if info.type == pafs.FileType.Directory:
                    self._fs.delete_dir(path)
                elif info.type == pafs.FileType.File:
                    self._fs.delete_file(path)

    @contextmanager
    def storage_errors(self, doing: str, path: str) -> Iterator[None]:
        """Raise the filesystem's errors, but for FileNotFoundError, as StorageError.

        The message has what was being done (`doing`: "writing") and the path.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{doing} {path} failed: {one_line(error)}") from error


def _write_local(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a local file atomically: beside its place, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
