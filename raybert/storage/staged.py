"""A file that is written in pieces, and replaces the one of its name as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from raybert.errors import StorageError
from raybert.storage.folder import Folder


@contextmanager
def staged_file(folder: Folder, name: str) -> Iterator[Any]:
    """Open a file for writing bytes; it has its name once the context ends without an error.

    Until then it has a name of its own beside it, hidden: several writers do not mix, and a link
    that somebody has planted there is not followed. StorageError if it can't be opened or
    completed.
    """
    hidden = f".{name}.{uuid.uuid4().hex}"
    path = folder.join(name)
    with folder.storage_errors("writing", path):
        stream = _create(Path(folder.join(hidden))) if folder.is_local else None
        if stream is None:
            stream = folder.filesystem.open_output_stream(folder.join(hidden))
    try:
        yield stream
        with folder.storage_errors("writing", path):
            if folder.is_local:
                stream.flush()
                os.fsync(stream.fileno())
            stream.close()
            _rename(folder, hidden, name)
    finally:
        with suppress(OSError, StorageError):
            stream.close()  # on an object store this creates the file
        with suppress(StorageError):
            folder.delete(hidden)


def _create(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


def _rename(folder: Folder, hidden: str, name: str) -> None:
    if folder.is_local:
        os.replace(folder.join(hidden), folder.join(name))
        return
    try:
        folder.filesystem.copy_file(folder.join(hidden), folder.join(name))
    except OSError:  # S3 copies at most 5 GB by itself
        pafs.copy_files(
            folder.join(hidden), folder.join(name), folder.filesystem, folder.filesystem
        )
