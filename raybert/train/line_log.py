"""A file of lines that a run appends to, on a disk or an object store, and never loses.

A line that can't be written does not end the run: it is kept until the storage accepts it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from raybert.errors import StorageError
from raybert.storage.folder import Folder

RETRY_SECONDS = 5.0  # between attempts to write to a storage that refuses: each may take long
MAX_PENDING_BYTES = 16 << 20  # of lines that a disk refuses: hours of a run
CHUNK_BYTES = 1 << 20  # of a file on an object store, the last of which is rewritten at each flush


class LineLog:
    """The lines of one file, in order, from one writer; a reader never sees a part of a line.

    On a disk a line is appended at once. On an object store `flush` writes the lines, in files of
    about `CHUNK_BYTES`: `name`, then `name` with a number before its suffix. The lines of the last
    file stay in memory.
    """

    def __init__(
        self, folder: Folder, name: str, on_event: Callable[[str], None] = lambda message: None
    ) -> None:
        """Set up; `on_event` gets a message when writing begins to fail, and when it succeeds."""
        self._folder, self._name, self._on_event = folder, name, on_event
        self._chunk = 0  # the index of the last file on an object store
        self._lines: deque[bytes] = deque()  # on a disk: those that are not written yet
        self._bytes = 0  # of these lines
        self._pending = self._dropped = 0  # numbers of lines: not stored yet, and lost
        self._file: FileIO | None = None
        self._end = 0  # the end of the last whole line on a disk, in bytes
        self._retry_at: float | None = None  # None: the last write succeeded

    def write(self, line: str) -> None:
        """Add a line."""
        self._lines.append(f"{line}\n".encode())
        self._bytes += len(self._lines[-1])
        self._pending += 1
        if self._folder.is_local:
            self._store()
            while self._bytes > MAX_PENDING_BYTES:
                self._pop_line()
                self._dropped += 1

    def flush(self) -> None:
        """Write all lines now, also after a failure."""
        if self._retry_at is not None:
            self._retry_at = 0.0
        self._store()

    def close(self) -> None:
        """Write the remaining lines; report how many are lost where that fails."""
        self.flush()
        if self._retry_at is not None:
            lost = self._pending + self._dropped
            self._on_event(f"{self._path} lacks the last {lost:,} lines")
        self._close_file()

    @property
    def _path(self) -> str:
        return self._folder.join(self._name)

    def _store(self) -> None:
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return
        try:
            self._append() if self._folder.is_local else self._rewrite()
        except (StorageError, OSError) as error:
            is_first, self._retry_at = self._retry_at is None, time.monotonic() + RETRY_SECONDS
            if is_first:
                self._on_event(f"{error}; its lines wait until it can be written")
            return
        if self._retry_at is not None:
            self._retry_at = None
            lacks = f", without {self._dropped:,} lines" if self._dropped else ""
            self._on_event(f"{self._path} is written again{lacks}")

    def _rewrite(self) -> None:
        if not self._pending:
            return
        stem, dot, suffix = self._name.rpartition(".")
        number = f".{self._chunk:06d}" if self._chunk else ""
        self._folder.write_bytes(f"{stem}{number}{dot}{suffix}", b"".join(self._lines))
        self._pending = 0
        if self._bytes >= CHUNK_BYTES:
            self._lines.clear()
            self._bytes, self._chunk = 0, self._chunk + 1

    def _append(self) -> None:
        with self._folder.storage_errors("writing", self._path):
            try:
                while self._lines:
                    self._append_whole(self._lines[0])
                    self._pop_line()
            except OSError:
                self._close_file()
                raise

    def _append_whole(self, line: bytes) -> None:
        if self._file is None:
            path = Path(self._path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(path, "a")
            # Cut off the part of a line that a full disk may have accepted.
            self._end = min(self._end, self._file.tell())
            self._file.truncate(self._end)
        rest = line
        while rest:  # a disk that is nearly full accepts a part
            rest = rest[self._file.write(rest) :]
        self._end += len(line)

    def _pop_line(self) -> None:
        self._bytes -= len(self._lines.popleft())
        self._pending -= 1

    def _close_file(self) -> None:
        """Close the file on a disk, truncated after its last whole line."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):
                file.truncate(self._end)
            with suppress(OSError):
                file.close()
