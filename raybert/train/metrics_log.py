"""A run's log: the records of `raybert.records`, one JSON object per line.

Object stores can't append, and an attempt that was killed may have logged steps that its successor
computes again. So each attempt writes a segment of its own, `metrics/<attempt>.jsonl`, and readers
merge them: from the step where a later attempt starts, the earlier one's lines no longer count. A
finished run has the merged lines in `metrics.jsonl`. A line that is no record, as the last one of
an attempt that was killed, is left out and counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, NamedTuple, cast

from raybert.records import EventName, EventRecord, OnRecord, Record, finite
from raybert.storage.folder import Folder
from raybert.train.line_log import LineLog
from raybert.train.state import Progress
from raybert.train.trackers import Trackers

MERGED = "metrics.jsonl"
SEGMENTS = "metrics"


class MetricsLog:
    """The log of an attempt on rank 0: to its segment and to a callback; elsewhere nothing."""

    def __init__(self, progress: Progress, on_record: OnRecord, *, is_first: bool = True) -> None:
        """Set up; `is_first`: this is rank 0. `on_record` gets every record with `total_steps`."""
        self._progress, self._is_first = progress, is_first
        self.on_record = on_record
        self._lines: LineLog | None = None
        self._trackers: Trackers | None = None

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
        self._trackers = Trackers(run, self._progress.step)

    def write(self, record: Record) -> None:
        """Log a record."""
        if self._is_first:
            self._write_line(record)
            total = self._progress.total_steps
            self.on_record(cast(Record, {**record, "total_steps": total}))
            if self._trackers is not None:
                self._trackers.log(record)
                self._tell(self._trackers.messages())

    def _write_line(self, record: Record) -> None:
        if self._lines is not None:
            timed = {"kind": record["kind"], "time": round(time.time(), 3), **record}
            self._lines.write(_to_line(timed))

    def event(self, event: EventName, message: str) -> None:
        """Log an event of the current step."""
        step = self._progress.step
        self.write({"kind": "event", "step": step, "event": event, "message": message})

    def storage_event(self, message: str) -> None:
        """Log a message about the storage."""
        self.event("storage", message)

    def finish_trackers(self, result: Mapping[str, Any]) -> None:
        """Give the trackers the result of a finished run."""
        if self._trackers is not None:
            self._tell(self._trackers.finish(result))

    def leave_trackers(self) -> None:
        """End the trackers of an attempt that has not finished."""
        if self._trackers is not None:
            self._trackers.leave()

    def _tell(self, messages: Iterable[str]) -> None:
        for message in messages:
            self.event("tracker", message)

    def flush(self) -> None:
        """Store all records; called at evaluations and before checkpoints."""
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        """Store the remaining records."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


class StoredLog(NamedTuple):
    """The records of a run, and how many lines of its log are none."""

    records: list[dict[str, Any]]
    damaged: int


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """Read a run's records in the order of steps, each step as its last attempt logged it."""
    return read_log(run).records


def read_log(run: Folder) -> StoredLog:
    """As `read_metrics`, with the number of lines that are no records."""
    return parse_lines(run.read_bytes(MERGED)) if run.exists(MERGED) else _merged(run)


def merge_metrics(run: Folder) -> str | None:
    """Write the merged records of a finished run; return a message if lines were left out.

    The last record says so, too.
    """
    records, damaged = _merged(run)
    message = None
    if damaged:
        step = records[-1]["step"] if records else 0
        message = f"{damaged:,} lines of {run / SEGMENTS} are no records and were left out"
        event = {"kind": "event", "time": round(time.time(), 3), "step": step}
        records.append({**event, "event": "damaged log", "message": message})
    run.write_text(MERGED, "".join(f"{_to_line(record)}\n" for record in records))
    return message


def _to_line(record: Mapping[str, Any]) -> str:
    """A record as JSON; a lone surrogate, which UTF-8 lacks, as its escape."""
    line = json.dumps(finite(dict(record)), ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode()


def _merged(run: Folder) -> StoredLog:
    folder = run / SEGMENTS
    merged: list[dict[str, Any]] = []
    damaged = 0
    files = sorted(folder.names(), key=_attempt_and_chunk)
    for _, names in groupby(files, lambda name: _attempt_and_chunk(name)[0]):
        parsed = [parse_lines(folder.read_bytes(name)) for name in names]
        damaged += sum(each.damaged for each in parsed)
        segment = [record for each in parsed for record in each.records]
        if segment:
            first = segment[0]["step"]
            merged = [record for record in merged if record["step"] <= first] + segment
    return StoredLog(merged, damaged)


def _attempt_and_chunk(name: str) -> tuple[str, str]:
    """Split the name of a segment's file: `0002.000001.jsonl` is ("0002", "000001")."""
    attempt, *number, _ = name.split(".")
    return attempt, "".join(number)


def parse_lines(data: bytes) -> StoredLog:
    """Parse the lines of a segment, which end at line feeds: a record may hold other line breaks.

    A record has a kind and a step; anything else is a line that was cut off or altered.
    """
    lines = [line for line in data.split(b"\n") if line.strip()]
    records = [record for line in lines if (record := _parse(line)) is not None]
    return StoredLog(records, len(lines) - len(records))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the attempt was killed while it wrote its last line
        return None
    is_record = (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and type(record.get("step")) is int
        and record["step"] >= 0
    )
    return record if is_record else None
