"""A folder at any path or URI that pyarrow's filesystems read: local, `s3://`, `gs://`, `hdfs://`.

Object stores neither append nor rename, so nothing here offers either: a file is written whole, and
on a local disk it appears whole (written beside, synced, renamed). A URI never holds credentials:
they come from where the store's own tools look for them, and stay out of everything written here.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs

from raybert.errors import DamagedError, StorageError, UserError, one_line

_NUMBER = re.compile(r"(\d+)-[0-9a-f]{8}\.json")
# How long S3 is waited for. A request that meets silence every time ends after 47 s at most, one
# that is refused (503, no connection) after 7 s: two in a row while other ranks wait for this one.
_CONNECT_SECONDS = 5
_SILENT_SECONDS = 10  # without a byte in either direction
_TRIES = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds between the tries of `patiently`

_SECRET_PARAMETER = re.compile(r"[?&][^=&]*(key|secret|password|token)[^=&]*=", re.IGNORECASE)

T = TypeVar("T")


class File(NamedTuple):
    """A file somewhere inside a folder."""

    name: str  # its path from the folder
    bytes: int
    changed: float  # Unix time, seconds


class Folder:
    """A folder of files, by name. Picklable: it travels to workers as its URI."""

    def __init__(self, uri: str | Path) -> None:
        """Open a local path or a URI.

        Raises:
            UserError: the URI's scheme or bucket can't be opened, or it holds credentials.
        """
        text = os.fspath(uri)
        check_address(text)
        # The query carries an object store's endpoint: it is no part of the path.
        self._base, _, self._query = text.partition("?") if "://" in text else (text, "", "")
        try:
            if text.startswith("s3://"):
                bucket, _, inside = self._base.removeprefix("s3://").partition("/")
                self._fs = _s3(bucket, self._query)
                self.path = unquote(f"{bucket}/{inside}").rstrip("/")
            elif "://" in text:
                self._fs, self.path = pafs.FileSystem.from_uri(text)
            else:
                self._fs, self.path = pafs.LocalFileSystem(), str(Path(text).expanduser().resolve())
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{text}: can't be opened: {one_line(error)}") from None

    @classmethod
    def of_file(cls, address: str) -> tuple[Folder, str]:
        """The folder that a file lies in, and the file's name there.

        Raises:
            UserError: as for a folder; the address is that of a bucket.
        """
        check_address(address)
        base, mark, query = address.partition("?") if "://" in address else (address, "", "")
        parent, slash, name = base.rpartition("/")
        if parent.endswith(":/"):
            raise UserError(f"{address}: names a bucket; name a file in it")
        folder = cls((parent or slash or ".") + mark + query)
        return folder, unquote(name) if "://" in address else name

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.uri,)

    def __truediv__(self, name: str) -> Folder:
        if self.is_local:
            return Folder(f"{self.path.rstrip('/')}/{name}")
        return Folder(f"{self._base.rstrip('/')}/{quote(name)}" + self._mark_and_query)

    def __str__(self) -> str:
        return str(self.path) if self.is_local else self._base

    @property
    def uri(self) -> str:
        """The address under which another process opens the same folder."""
        if self.is_local:
            return str(self.path)
        return self._base + self._mark_and_query

    @property
    def _mark_and_query(self) -> str:
        return f"?{self._query}" if self._query else ""

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
        with self.translated("looking up", path):
            return bool(self._fs.get_file_info(path).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None where there is none."""
        with self.translated("looking up", self.join(name)):
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
        with self.translated("listing", path):
            try:
                infos = self._fs.get_file_info(selector)
            except FileNotFoundError:  # somebody made the folder just as Arrow looked for it
                infos = self._fs.get_file_info(selector)
        return list(infos)

    def files(self) -> list[File]:
        """Every file inside, at any depth and hidden or not, by name."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with self.translated("listing", self.path):
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
        with self.translated("reading", self.join(name)):
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
        with self.translated("opening", self.join(name)):
            return self._fs.open_input_file(self.join(name))

    def write_bytes(self, name: str, data: bytes | memoryview | Sequence[memoryview]) -> None:
        """Write a file, given whole or in pieces, that appears whole or not at all."""
        pieces: Sequence[bytes | memoryview]
        pieces = [data] if isinstance(data, bytes | memoryview) else data
        path = self.join(name)
        with self.translated("writing", path):
            if self.is_local:
                _write_local(Path(path), pieces)
            else:
                with self._fs.open_output_stream(path) as stream:
                    for piece in pieces:
                        stream.write(piece)

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
        with self.translated("deleting", path):
            info = self._fs.get_file_info(path)
            with suppress(FileNotFoundError):  # somebody else deletes it, too
                if info.type == pafs.FileType.Directory:
                    self._fs.delete_dir(path)
                elif info.type == pafs.FileType.File:
                    self._fs.delete_file(path)

    @contextmanager
    def translated(self, doing: str, path: str) -> Iterator[None]:
        """Say what goes wrong inside in our words; a file that is not there stays what it is.

        Raises:
            StorageError: `doing` what was done with `path` failed.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{doing} {path} failed: {one_line(error)}") from error


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


def check_address(text: str) -> None:
    """Refuse a URI that holds credentials: they would stand in configurations, logs and messages.

    Raises:
        UserError: it does; the message does not repeat them.
    """
    scheme, mark, rest = text.partition("://")
    host = re.split("[/?]", rest, maxsplit=1)[0]
    # A bucket of S3 has neither sign in its name, and a secret may have a slash, which ends a host.
    holds = ("@" in host or ":" in host) if scheme == "s3" else ":" in host.rpartition("@")[0]
    if mark and (holds or _SECRET_PARAMETER.search(rest)):
        raise UserError(
            f"{scheme}://... holds a key or a password, which would be written down wherever this "
            "address is; leave it out, and give it to every node by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, by ~/.aws/credentials, or as its store's own tools take it"
        )


@lru_cache(maxsize=64)
def _s3(bucket: str, query: str) -> pafs.FileSystem:
    """The filesystem of a bucket: one client for all folders in it, with bounds to its patience."""
    opened, _ = pafs.FileSystem.from_uri(f"s3://{bucket}" + (f"?{query}" if query else ""))
    if not bucket:
        raise pa.ArrowInvalid("it names no bucket")
    # A URI can't set these, so it is made anew of what the URI set: the options that it pickles as.
    _, (options,) = opened.__reduce__()
    options["connect_timeout"], options["request_timeout"] = _CONNECT_SECONDS, _SILENT_SECONDS
    options["retry_strategy"] = pafs.AwsStandardS3RetryStrategy(max_attempts=_TRIES)
    return pafs.S3FileSystem(**options)


def retry(
    action: Callable[[], T], seconds: float, tell: Callable[[str], None] = lambda text: None
) -> T:
    """Do something with a storage that may refuse for a while: try again, at growing intervals.

    Args:
        action: what to do; it is done anew from its beginning.
        seconds: which are not exceeded by a try that takes as long as the one before.
        tell: is given the first refusal, in a line.

    Raises:
        StorageError: the storage refused to the end.
    """
    until, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        begun = time.monotonic()
        try:
            return action()
        except StorageError as error:
            now = time.monotonic()
            left = until - now - (now - begun)
            if left <= 0:
                raise
            if pause == _FIRST_PAUSE:
                tell(f"{error}; it is tried again for {left:.0f} s")
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _write_local(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
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
