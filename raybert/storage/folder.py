"""A folder at any path or URI that pyarrow's filesystems read: local, `s3://`, `gs://`, `hdfs://`.

Object stores neither append nor rename, so a file is always written as a whole. A URI never holds
credentials: they come from where the store's own tools look for them.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs

from raybert.errors import DamagedError, StorageError, UserError, one_line

# Time limits of S3. A request without any answer ends after 47 s at most, one that is refused (503,
# no connection) after 7 s; other ranks may wait for two of them in a row.
_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 10  # without a byte in either direction
_TRIES = 4

_SCHEME = re.compile(r"(?=(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*://)")  # where a URI begins
_SECRET_PARAMETER = re.compile(
    r"[?&][^=&]*(key|secret|passw|token|credential|\bsig|signature)[^=&]*=", re.IGNORECASE
)


def check_address(address: str) -> None:
    """Raise UserError if a URI holds credentials: files, logs and messages would show them."""
    scheme, mark, rest = address.partition("://")
    host = re.split("[/?]", rest, maxsplit=1)[0]
    # An S3 bucket's name has neither sign, and a secret may have a slash, which ends a host.
    holds = ("@" in host or ":" in host) if scheme == "s3" else ":" in host.rpartition("@")[0]
    if mark and (holds or _SECRET_PARAMETER.search(rest)):
        raise UserError(
            f"{scheme}://... holds a key or a password, which would be written wherever this "
            "address is; leave it out, and give it to every node by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, by ~/.aws/credentials, or as its store's own tools take it"
        )


def check_texts(texts: Iterable[str]) -> None:
    """Raise UserError if a text has a URI in it that holds credentials."""
    for text in texts:
        for part in _SCHEME.split(text)[1:]:
            check_address(part.split(maxsplit=1)[0])


def split_query(address: str) -> tuple[str, str]:
    """Split a URI into its base and its query, which carries an object store's endpoint."""
    base, _, query = address.partition("?") if "://" in address else (address, "", "")
    return base, query


def open_filesystem(address: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of an address, and the path on it; a UserError if it can't be opened."""
    check_address(address)
    try:
        address.encode()  # no lone surrogates, which no filesystem takes
        if address.startswith("s3://"):
            base, query = split_query(address)
            bucket, _, inside = base.removeprefix("s3://").partition("/")
            return _s3(bucket, query), unquote(f"{bucket}/{inside}").rstrip("/")
        if "://" in address:
            filesystem, path = pafs.FileSystem.from_uri(address)
            return filesystem, path
        # `Path.resolve` raises for links in a circle.
        return pafs.LocalFileSystem(), os.path.realpath(os.path.expanduser(address))
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        remedy = "; download it first" if address.startswith(("http://", "https://")) else ""
        raise UserError(f"{address}: can't be opened: {one_line(error)}{remedy}") from None


@lru_cache(maxsize=64)
def _s3(bucket: str, query: str) -> pafs.FileSystem:
    """The filesystem of a bucket: one client for all folders in it, with time limits."""
    opened, _ = pafs.FileSystem.from_uri(f"s3://{bucket}" + (f"?{query}" if query else ""))
    if not bucket:
        raise pa.ArrowInvalid("it names no bucket")
    # A URI can't set the limits: a new client gets the options that the URI's one pickles as.
    _, (options,) = opened.__reduce__()
    options["connect_timeout"], options["request_timeout"] = _CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S
    options["retry_strategy"] = pafs.AwsStandardS3RetryStrategy(max_attempts=_TRIES)
    return pafs.S3FileSystem(**options)


class File(NamedTuple):
    """A file at any depth of a folder."""

    name: str  # its path relative to the folder
    bytes: int
    changed: float  # Unix time, seconds


class Folder:
    """A folder of files, by name. Picklable: it is sent to workers as its URI."""

    def __init__(self, uri: str | Path) -> None:
        """Open a local path or a URI; a UserError if it can't be opened or holds credentials."""
        address = os.fspath(uri)
        self.filesystem, self.path = open_filesystem(address)
        self._base, self._query = split_query(address)

    @classmethod
    def of_file(cls, address: str) -> tuple[Folder, str]:
        """The folder that a file is in, and the file's name; a UserError for a bucket's address."""
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
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def join(self, name: str) -> str:
        """The path of `name` on `filesystem`."""
        return f"{self.path.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name."""
        path = self.join(name) if name else self.path
        with self.storage_errors("looking up", path):
            return bool(self.filesystem.get_file_info(path).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; None where there is none."""
        with self.storage_errors("looking up", self.join(name)):
            info = self.filesystem.get_file_info(self.join(name))
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
                infos = self.filesystem.get_file_info(selector)
            except FileNotFoundError:  # the folder was created just while Arrow looked for it
                infos = self.filesystem.get_file_info(selector)
        return list(infos)

    def files(self) -> list[File]:
        """Every file inside, at any depth and hidden or not, by name."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with self.storage_errors("listing", self.path):
            infos = self.filesystem.get_file_info(selector)
        base = self.join("")
        return sorted(
            File(info.path.removeprefix(base), info.size or 0, (info.mtime_ns or 0) / 1e9)
            for info in infos
            if info.type == pafs.FileType.File
        )

    def read_bytes(self, name: str) -> bytes:
        """Read a file; FileNotFoundError if there is none, StorageError if the storage fails."""
        with self.storage_errors("reading", self.join(name)):
            with self.filesystem.open_input_stream(self.join(name)) as stream:
                return bytes(stream.read())

    def read_text(self, name: str) -> str:
        """Read a whole file as UTF-8; DamagedError if it is not."""
        try:
            return self.read_bytes(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self.join(name)} is damaged: it is not UTF-8 ({error})") from None

    def read_json(self, name: str) -> Any:
        """Read a JSON file; DamagedError if it is not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets
            reason = one_line(error)
            raise DamagedError(f"{self.join(name)} is damaged: it is not JSON ({reason})") from None

    def open_input(self, name: str) -> pa.NativeFile:
        """Open a file for reads at any offset (`read_at`, safe from several threads)."""
        with self.storage_errors("opening", self.join(name)):
            return self.filesystem.open_input_file(self.join(name))

    def write_bytes(self, name: str, data: bytes | memoryview | Sequence[memoryview]) -> None:
        """Write a file, given whole or in pieces; no reader ever sees a part of it."""
        pieces: Sequence[bytes | memoryview]
        pieces = [data] if isinstance(data, bytes | memoryview) else data
        path = self.join(name)
        with self.storage_errors("writing", path):
            opened: Any
            opened = new_file(path) if self.is_local else self.filesystem.open_output_stream(path)
            with opened as stream:
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
            info = self.filesystem.get_file_info(path)
            with suppress(FileNotFoundError):  # another process has deleted it
                if info.type == pafs.FileType.Directory:
                    self.filesystem.delete_dir(path)
                elif info.type == pafs.FileType.File:
                    self.filesystem.delete_file(path)

    @contextmanager
    def storage_errors(self, doing: str, path: str) -> Iterator[None]:
        """Raise the filesystem's errors as StorageError, but not FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{doing} {path} failed: {one_line(error)}") from error


@contextmanager
def new_file(path: str, place: Callable[[str, str], None] = os.replace) -> Iterator[BufferedWriter]:
    """Write a local file beside its place; synced, it gets its name when the context ends.

    After an error it is deleted. `place` moves it; `os.link` leaves a file that is there already.
    """
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(beside, "xb") as file:  # never through a link that is there already
            yield file
            file.flush()
            os.fsync(file.fileno())
        place(beside, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)
