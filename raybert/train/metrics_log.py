"""A run's log: the records of `raybert.records`, one JSON object per line.

Object stores can't append, and an attempt that was killed may have logged steps that its successor
computes again. So each attempt writes a segment of its own, `metrics/<attempt>.jsonl`, and readers
merge them: from the step where a later attempt starts, the earlier one's lines no longer count. A
finished run has the merged lines in `metrics.jsonl`.
"""

from __future__ import annotations

import json
import time
from itertools import groupby
from typing import Any, cast

from raybert.records import EventName, EventRecord, OnRecord, Record, finite
from raybert.storage.folder import Folder
from raybert.train.line_log import LineLog
from raybert.train.state import Progress

MERGED = "metrics.jsonl"
SEGMENTS = "metrics"


class MetricsLog:
    """The log of an attempt on rank 0: to its segment and to a callback; elsewhere nothing."""

    def __init__(self, progress: Progress, on_record: OnRecord, *, is_first: bool = True) -> None:
        """Set up; `is_first`: this is rank 0. `on_record` gets every record with `total_steps`."""
        self._progress, self._is_first = progress, is_first
        self.on_record = on_record
        self._lines: LineLog | None = None

    @property
    def is_open(self) -> bool:
        """Whether records are written to a segment."""
        return self._lines is not None

    def open(self, run: Folder, attempt: int, workers: int = 1, weights: str | None = None) -> None:
        """Begin the segment of an attempt with a `start` event; `weights`: those resumed from."""
        if not self._is_first:
            return
        name = f"{attempt:04d}.jsonl"
        self._lines = LineLog(run / SEGMENTS, name, self.storage_event)
        start: EventRecord = {"kind": "event", "step": self._progress.step, "event": "start"}
        start |= {"attempt": attempt, "workers": workers}
        if weights is not None:
            start["weights"] = weights
        self._write_line(start)

    def write(self, record: Record) -> None:
        """Log a record."""
        if self._is_first:
            self._write_line(record)
            total = self._progress.total_steps
            self.on_record(cast(Record, {**record, "total_steps": total}))

    def _write_line(self, record: Record) -> None:
        if self._lines is not None:
            timed = {"kind": record["kind"], "time": round(time.time(), 3), **record}
            self._lines.write(json.dumps(finite(timed), ensure_ascii=False))

    def event(self, event: EventName, message: str) -> None:
        """Log an event of the current step."""
        step = self._progress.step
        self.write({"kind": "event", "step": step, "event": event, "message": message})

    def storage_event(self, message: str) -> None:
        """Log a message about the storage."""
        self.event("storage", message)

    def flush(self) -> None:
        """Store all records; called at evaluations and before checkpoints."""
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        """Store the remaining records."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """Read a run's records in the order of steps, each step as its last attempt logged it."""
    return parse_lines(run.read_text(MERGED)) if run.exists(MERGED) else _merged(run)


def merge_metrics(run: Folder) -> None:
    """Write the merged records of a finished run."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in _merged(run))
    run.write_text(MERGED, "".join(lines))


def _merged(run: Folder) -> list[dict[str, Any]]:
    folder = run / SEGMENTS
    merged: list[dict[str, Any]] = []
    files = sorted(folder.names(), key=_attempt_and_chunk)
    for _, names in groupby(files, lambda name: _attempt_and_chunk(name)[0]):
        segment = [record for name in names for record in parse_lines(folder.read_text(name))]
        if segment:
            first = segment[0]["step"]
            merged = [record for record in merged if record["step"] <= first] + segment
    return merged


def _attempt_and_chunk(name: str) -> tuple[str, str]:
    """Split the name of a segment's file: `0002.000001.jsonl` is ("0002", "000001")."""
    attempt, *number, _ = name.split(".")
    return attempt, "".join(number)


def parse_lines(text: str) -> list[dict[str, Any]]:
    """Parse the records of a segment; a line that was cut off is left out."""
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the attempt was killed while it wrote its last line
            continue
    return records
