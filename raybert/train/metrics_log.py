"""What a run writes down while it trains: one JSON object a line, in segments by attempt.

Object stores can't append, and a killed attempt may have logged steps that its successor computes
again. So each attempt writes a segment of its own, `metrics/<attempt>.jsonl`, and readers merge
them: from where a younger attempt starts, the older one's lines no longer count. A finished run has
the merged lines in `metrics.jsonl`.

No line that can't be written ends a run: it waits until the storage takes it.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

from raybert.errors import StorageError
from raybert.storage.folder import Folder

MERGED = "metrics.jsonl"
SEGMENTS = "metrics"

RETRY_SECONDS = 5.0  # between tries at a storage that refuses: some take long to say so
MOST_WAITING = 16 << 20  # bytes of lines that a disk does not take: hours of them
CHUNK_BYTES = 1 << 20  # of a file on an object store, whose last one is written again and again


class LineLog:
    """The lines of one file, in order, from one writer; each ends in a line feed or is not there.

    On a disk a line is appended at once. On an object store `flush` writes all of them, in files
    of about `CHUNK_BYTES`: `name`, then `name` with a number before its suffix. The lines of the
    last one stay in memory. Lines that can't be written are kept, and tried again with the next.
    """

    def __init__(
        self, folder: Folder, name: str, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """Begin the file anew with the first line; `tell` is given trouble, and its end, once."""
        self._folder, self._name, self._tell = folder, name, tell
        self._chunk = 0  # on an object store: the number of the last file
        self._lines: deque[bytes] = deque()  # on a disk: those that are not on it yet
        self._bytes = 0  # of these lines
        self._waiting = self._dropped = 0  # lines: not stored yet, and never to be
        self._file: FileIO | None = None
        self._end = 0  # of a disk's last whole line, in bytes
        self._retry_at: float | None = None  # None while all is well

    def write(self, line: str) -> None:
        """Add a line."""
        self._lines.append(f"{line}\n".encode())
        self._bytes += len(self._lines[-1])
        self._waiting += 1
        if self._folder.is_local:
            self._store()
            while self._bytes > MOST_WAITING:
                self._take_off()
                self._dropped += 1

    def flush(self) -> None:
        """Bring the file up to date, now: an object store's, or a disk's that refused before."""
        if self._retry_at is not None:
            self._retry_at = 0.0
        self._store()

    def close(self) -> None:
        """Try once more to write what is left; say how much is lost."""
        self.flush()
        if self._retry_at is not None:
            lost = self._waiting + self._dropped
            self._tell(f"{self._path} lacks the last {lost:,} lines")
        self._let_go()

    @property
    def _path(self) -> str:
        return self._folder.join(self._name)

    def _store(self) -> None:
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return
        try:
            self._append() if self._folder.is_local else self._rewrite()
        except (StorageError, OSError) as error:
            is_new, self._retry_at = self._retry_at is None, time.monotonic() + RETRY_SECONDS
            if is_new:
                self._tell(f"{error}; its lines wait until it can be written")
            return
        if self._retry_at is not None:
            self._retry_at = None
            lacks = f", without {self._dropped:,} lines" if self._dropped else ""
            self._tell(f"{self._path} is written again{lacks}")

    def _rewrite(self) -> None:
        if not self._waiting:
            return
        stem, dot, suffix = self._name.rpartition(".")
        number = f".{self._chunk:06d}" if self._chunk else ""
        self._folder.write_bytes(f"{stem}{number}{dot}{suffix}", b"".join(self._lines))
        self._waiting = 0
        if self._bytes >= CHUNK_BYTES:
            self._lines.clear()
            self._bytes, self._chunk = 0, self._chunk + 1

    def _append(self) -> None:
        with self._folder.storage_errors("writing", self._path):
            try:
                while self._lines:
                    self._append_whole(self._lines[0])
                    self._take_off()
            except OSError:
                self._let_go()
                raise

    def _append_whole(self, line: bytes) -> None:
        if self._file is None:
            path = Path(self._path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(path, "a")
            # Behind the last whole line: what a full disk took of the next one is no line.
            self._end = min(self._end, self._file.tell())
            self._file.truncate(self._end)
        rest = line
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._file.write(rest) :]
        self._end += len(line)

    def _take_off(self) -> None:
        self._bytes -= len(self._lines.popleft())
        self._waiting -= 1

    def _let_go(self) -> None:
        """Close a disk's file, with nothing behind its last whole line."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):
                file.truncate(self._end)
            with suppress(OSError):
                file.close()


class MetricsLog:
    """Writes an attempt's segment."""

    def __init__(
        self,
        run: Folder,
        attempt: int,
        first_step: int,
        *,
        workers: int = 1,
        weights: str | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Open the segment of an attempt that starts at `first_step` with so many workers.

        `weights` is the hash of those that it goes on from, where they are not fresh ones; `tell`
        is given trouble with its lines, and its end.
        """
        self._lines = LineLog(run / SEGMENTS, f"{attempt:04d}.jsonl", tell)
        start = {"kind": "event", "step": first_step, "event": "start"}
        loaded = {} if weights is None else {"weights": weights}
        self.write({**start, "attempt": attempt, "workers": workers, **loaded})

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; its time is added. NaN and infinity become null, as JSON demands."""
        record = {"kind": record["kind"], "time": round(time.time(), 3), **record}
        self._lines.write(json.dumps(finite(record), ensure_ascii=False))

    def flush(self) -> None:
        """Bring the segment up to date; called at evaluations and before checkpoints."""
        self._lines.flush()

    def close(self) -> None:
        """Write what is left."""
        self._lines.close()


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """Read a run's records in the order of steps, each step as its youngest attempt saw it."""
    return parse_lines(run.read_text(MERGED)) if run.exists(MERGED) else _merged(run)


def merge_metrics(run: Folder) -> None:
    """Write the merged records of a finished run."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in _merged(run))
    run.write_text(MERGED, "".join(lines))


def _merged(run: Folder) -> list[dict[str, Any]]:
    folder = run / SEGMENTS
    merged: list[dict[str, Any]] = []
    for _, names in groupby(sorted(folder.names(), key=_place), lambda name: _place(name)[0]):
        segment = [record for name in names for record in parse_lines(folder.read_text(name))]
        if segment:
            first = segment[0]["step"]
            merged = [record for record in merged if record["step"] <= first] + segment
    return merged


def _place(name: str) -> tuple[str, str]:
    """The attempt whose lines a file holds, and the file's place among that attempt's."""
    attempt, *number, _ = name.split(".")
    return attempt, "".join(number)


def parse_lines(text: str) -> list[dict[str, Any]]:
    """Read the records of a segment, but for a line that was cut off."""
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the last line of an attempt that was killed while it wrote
            continue
    return records


def finite(value: Any) -> Any:
    """A value of JSON with null for NaN and infinity, which JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


class ThroughputMeter:
    """Tokens per second and waiting time since the last reading."""

    def __init__(self) -> None:
        self._since, self._tokens, self._waited, self._steps = time.perf_counter(), 0.0, 0.0, 0

    def add(self, tokens: float, waited: float) -> None:
        """Count a step: its tokens over all ranks, the seconds spent waiting for data."""
        self._tokens, self._waited, self._steps = (
            self._tokens + tokens,
            self._waited + waited,
            self._steps + 1,
        )

    def read(self) -> dict[str, float]:
        """Return the interval's rates and start the next interval."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        steps = max(1, self._steps)
        rates = {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "step_seconds": round(seconds / steps, 6),
            "data_wait": round(self._waited / steps, 6),
        }
        self.__init__()  # type: ignore[misc]
        return rates
