"""What a run writes down while it trains: one JSON object a line, in segments by attempt.

Object stores can't append, and a killed attempt may have logged steps that its successor computes
again. So each attempt writes a segment of its own, `metrics/<attempt>.jsonl`, and readers merge
them: from where a younger attempt starts, the older one's lines no longer count. A finished run has
the merged lines in `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from raybert.errors import StorageError
from raybert.storage import Folder

MERGED = "metrics.jsonl"
SEGMENTS = "metrics"


class MetricsLog:
    """Writes an attempt's segment: appended line by line on a disk, rewritten whole elsewhere."""

    def __init__(self, run: Folder, attempt: int, first_step: int, workers: int = 1) -> None:
        """Open the segment of an attempt that starts at `first_step` with so many workers."""
        self._folder, self._name = run / SEGMENTS, f"{attempt:04d}.jsonl"
        self._lines: list[str] = []
        self._file: TextIO | None = None
        if self._folder.is_local:
            self._file = open_lines(self._folder, self._name)
        start = {"kind": "event", "step": first_step, "event": "start"}
        self.write({**start, "attempt": attempt, "workers": workers})

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; its time is added. NaN and infinity become null, as JSON demands.

        Raises:
            StorageError: the disk is full.
        """
        record = {"kind": record["kind"], "time": round(time.time(), 3), **record}
        line = json.dumps(finite(record), ensure_ascii=False)
        if self._file is not None:
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                name = self._folder.join(self._name)
                raise StorageError(f"writing {name} failed: {error.strerror or error}") from None
        else:
            self._lines.append(line)

    def flush(self) -> None:
        """Bring an object store's segment up to date; called at evaluations and checkpoints."""
        if self._file is None:
            self._folder.write_text(self._name, "".join(line + "\n" for line in self._lines))

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what can't be written was told by `write`
                self._file.close()


def open_lines(folder: Folder, name: str) -> TextIO:
    """Open a local file that is written line by line, each of which is on the disk at once.

    Raises:
        StorageError: it can't be made.
    """
    path = Path(folder.join(name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise StorageError(f"writing {path} failed: {error.strerror or error}") from None


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """Read a run's records in the order of steps, each step as its youngest attempt saw it."""
    if run.exists(MERGED):
        return parse_lines(run.read_text(MERGED))
    folder = run / SEGMENTS
    merged: list[dict[str, Any]] = []
    for name in folder.names():
        segment = parse_lines(folder.read_text(name))
        if segment:
            first = segment[0]["step"]
            merged = [record for record in merged if record["step"] <= first] + segment
    return merged


def merge_metrics(run: Folder) -> None:
    """Write the merged records of a finished run."""
    records = read_metrics(run)
    run.write_text(MERGED, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


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


class Rate:
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
