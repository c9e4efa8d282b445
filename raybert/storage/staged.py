"""A file that is written in pieces, and replaces the one of its name as a whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pyarrow.fs as pafs

from raybert.errors import StorageError
from raybert.storage.folder import Folder, new_file


@contextmanager
def staged_file(folder: Folder, name: str) -> Iterator[Any]:
    """Open a file for writing bytes; it has its name once the context ends without an error.

    Until then it has a name of its own beside it, hidden: several writers do not mix, and a link
    that somebody has planted there is not followed. StorageError if it can't be opened or
    completed.
    """
    path = folder.join(name)
    with ExitStack() as exits:
        with folder.storage_errors("writing", path):
            opened = new_file(path) if folder.is_local else _copied_file(folder, name)
            stream = exits.enter_context(opened)
        yield stream
        with folder.storage_errors("writing", path):
            exits.close()


@contextmanager
def _copied_file(folder: Folder, name: str) -> Iterator[Any]:
    """Write a file on an object store, which can't rename it."""
    hidden = f".{name}.{uuid.uuid4().hex}"
    begin, end = folder.join(hidden), folder.join(name)
    stream = folder.filesystem.open_output_stream(begin)
    try:
        yield stream
        stream.close()
        try:
            folder.filesystem.copy_file(begin, end)
        except OSError:  # S3 copies at most 5 GB by itself
            pafs.copy_files(begin, end, folder.filesystem, folder.filesystem)
    finally:
        with suppress(OSError):
            stream.close()  # which creates the file
        with suppress(StorageError):
            folder.delete(hidden)
