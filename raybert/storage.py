"""A folder at any path or URI that pyarrow's filesystems read: local, `s3://`, `gs://`, `hdfs://`.

Object stores neither append nor rename, so nothing here offers either: a file is written whole, and
on a local disk it appears whole (written beside, synced, renamed).
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raybert.errors import DamagedError, StorageError, UserError

_NUMBER = re.compile(r"(\d+)-[0-9a-f]{8}\.json")


class Folder:
    """A folder of files, by name. Picklable: it travels to workers as its URI."""

    def __init__(self, uri: str | Path) -> None:
        """Open a local path or a URI.

        Raises:
            UserError: the URI's scheme or bucket can't be opened.
        """
        text = os.fspath(uri)
        # The query carries an object store's endpoint: it is no part of the path.
        self._base, _, self._query = text.partition("?") if "://" in text else (text, "", "")
        try:
            if "://" in text:
                self._fs, self.path = pafs.FileSystem.from_uri(text)
            else:
                self._fs, self.path = pafs.LocalFileSystem(), str(Path(text).expanduser().resolve())
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{text}: can't be opened: {error}") from None

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.uri,)

    def __truediv__(self, name: str) -> Folder:
        base = self.path if self.is_local else self._base
        return Folder(f"{base.rstrip('/')}/{name}" + (f"?{self._query}" if self._query else ""))

    def __str__(self) -> str:
        return str(self.path) if self.is_local else self._base

    @property
    def uri(self) -> str:
        """The address under which another process opens the same folder."""
        if self.is_local:
            return str(self.path)
        return self._base + (f"?{self._query}" if self._query else "")

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's filesystem."""
        return isinstance(self._fs, pafs.LocalFileSystem)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem that reads it."""
        return self._fs

    def join(self, name: str) -> str:
        """The path of `name` on `filesystem`."""
        return f"{self.path.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        path = self.join(name) if name else self.path
        with self._translated("looking up", path):
            return bool(self._fs.get_file_info(path).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None where there is none."""
        with self._translated("looking up", self.join(name)):
            info = self._fs.get_file_info(self.join(name))
        return int(info.size) if info.type == pafs.FileType.File else None

    def names(self, name: str = "", *, hidden: bool = False) -> list[str]:
        """The sorted names of the files and folders directly inside; empty where there is none."""
        path = self.join(name) if name else self.path
        selector = pafs.FileSelector(path, allow_not_found=True)
        with self._translated("listing", path):
            try:
                infos = self._fs.get_file_info(selector)
            except FileNotFoundError:  # somebody made the folder just as Arrow looked for it
                infos = self._fs.get_file_info(selector)
            found = [info.base_name for info in infos]
        return sorted(name for name in found if hidden or not name.startswith("."))

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: no file of that name.
            StorageError: the storage does not answer.
        """
        with self._translated("reading", self.join(name)):
            with self._fs.open_input_stream(self.join(name)) as stream:
                return bytes(stream.read())

    def read_text(self, name: str) -> str:
        """Read a whole file as UTF-8."""
        return self.read_bytes(name).decode("utf-8")

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            DamagedError: it is not JSON.
        """
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise DamagedError(f"{self.join(name)} is damaged: it is not JSON ({error})") from None

    def open_input(self, name: str) -> pa.NativeFile:
        """Open a file for reads at any offset (`read_at`, safe from several threads)."""
        with self._translated("opening", self.join(name)):
            return self._fs.open_input_file(self.join(name))

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Write a file that appears whole or not at all."""
        path = self.join(name)
        with self._translated("writing", path):
            if self.is_local:
                _write_local(Path(path), data)
            else:
                with self._fs.open_output_stream(path) as stream:
                    stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file that appears whole or not at all."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, indented for people, that appears whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy_to(self, other: Folder, *, last: str) -> None:
        """Copy the files directly inside; the one named `last` tells that the others are there."""
        files = [name for name in self.names() if self.size(name) is not None]
        for name in sorted(files, key=lambda name: (name == last, name)):
            other.write_bytes(name, self.read_bytes(name))

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all it holds; nothing happens where there is none."""
        path = self.join(name)
        with self._translated("deleting", path):
            info = self._fs.get_file_info(path)
            if info.type == pafs.FileType.Directory:
                self._fs.delete_dir(path)
            elif info.type == pafs.FileType.File:
                self._fs.delete_file(path)

    @contextmanager
    def _translated(self, doing: str, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise StorageError(f"{doing} {path} failed: {reason}") from error


def take_number(folder: Folder) -> int:
    """Take the next number of a folder, which nobody else then gets, and leave a file for it.

    Two may ask at once, and object stores have no locks. Each writes a file under a name that
    nobody else has, and then looks: of those with one number, whoever wrote last sees the others,
    and moves on.
    """
    number = 1 + max(numbers_taken(folder), default=0)
    while True:
        mine = f"{number:04d}-{uuid.uuid4().hex[:8]}.json"
        folder.write_json(mine, {"number": number})
        rivals = [name for name in folder.names() if name.startswith(f"{number:04d}-")]
        if rivals == [mine]:
            return number
        # Those that saw each other move to different numbers.
        number = 1 + max(numbers_taken(folder)) + rivals.index(mine)


def numbers_taken(folder: Folder) -> list[int]:
    """The numbers of which there are files, in no order."""
    return [int(match[1]) for match in map(_NUMBER.fullmatch, folder.names()) if match]


def _write_local(path: Path, data: bytes | memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
