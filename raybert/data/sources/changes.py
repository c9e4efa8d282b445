"""What has changed between two fingerprints of a source: a file, its size, its time or content."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raybert.data.sources.files import File
from raybert.errors import printable

_BLOCK_BYTES = 1 << 20
_MAX_HASHED_BYTES = 2 << 30  # of a source; of a larger one, times of files are compared


class Change(NamedTuple):
    """A file that differs, with what it was and what it is, in words."""

    name: str
    before: str
    now: str


def changes(
    before: Sequence[Sequence[Any]],
    now: Sequence[Sequence[Any]],
    hashes: Mapping[str, str] | None = None,
    files: Mapping[str, File] | None = None,
) -> Iterator[Change]:
    """Yield the files that differ between two results of `documents.fingerprint`.

    A file of another time has not changed if its content has the hash that it had; `files` are
    those of now.
    """
    old, new = ({name: list(rest) for name, *rest in files} for files in (before, now))
    for name in [*old, *(name for name in new if name not in old)]:
        was, found = old.get(name), new.get(name)
        if was == found:
            continue
        known = (hashes or {}).get(name)
        is_touched = was is not None and found is not None and was[0] == found[0]
        if known and is_touched and files and hash_content(files[name]) == known:
            continue
        yield Change(printable(str(name)), _describe(was), _describe(found))


def hash_files(files: Sequence[File]) -> dict[str, str]:
    """The SHA-256 of each file by its name; empty where they are too large to be read again."""
    if sum(file.size for file in files) > _MAX_HASHED_BYTES:
        return {}
    return {file.name: hash_content(file) for file in files}


def hash_content(file: File) -> str:
    """The SHA-256 of a file's bytes; a DataError if it can't be read."""
    digest = hashlib.sha256()
    with file.open_seekable() as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _describe(values: list[Any] | None) -> str:
    if values is None:
        return "(not there)"
    size, mtime = values
    if isinstance(size, str):  # a tokenizer's hash
        return size[:12]
    if mtime is None:
        return f"of {size:,} bytes"
    when = datetime.datetime.fromtimestamp(mtime / 1e9, datetime.UTC)
    return f"of {size:,} bytes from {when:%Y-%m-%d %H:%M:%S} UTC"
