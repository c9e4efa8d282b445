"""A run's metrics: one JSON object a line, in one segment for each attempt.

Object stores can't append, and an attempt that was killed may have logged steps that its successor
computes again. So each attempt writes a segment of its own, `metrics/<attempt>.jsonl`, and readers
merge them: from the step where a younger attempt starts, the older one's lines no longer count. A
finished run has the merged lines in `metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

from raybert.storage.folder import Folder
from raybert.train.line_log import LineLog

MERGED = "metrics.jsonl"
SEGMENTS = "metrics"


class MetricsLog:
    """Writes the segment of an attempt."""

    def __init__(
        self,
        run: Folder,
        attempt: int,
        first_step: int,
        *,
        workers: int = 1,
        weights: str | None = None,
        on_event: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Begin the segment with a `start` event.

        Args:
            run: the run's folder.
            attempt: the attempt's number.
            first_step: the step that the attempt starts at.
            workers: how many processes train.
            weights: the hash of the weights that it resumes from; None: fresh ones.
            on_event: gets a message when writing begins to fail, and when it succeeds again.
        """
        self._lines = LineLog(run / SEGMENTS, f"{attempt:04d}.jsonl", on_event)
        start = {"kind": "event", "step": first_step, "event": "start"}
        loaded = {} if weights is None else {"weights": weights}
        self.write({**start, "attempt": attempt, "workers": workers, **loaded})

    def write(self, record: dict[str, Any]) -> None:
        """Write a record with the time; NaN and infinity become null, which JSON lacks."""
        record = {"kind": record["kind"], "time": round(time.time(), 3), **record}
        self._lines.write(json.dumps(finite(record), ensure_ascii=False))

    def flush(self) -> None:
        """Store all records; called at evaluations and before checkpoints."""
        self._lines.flush()

    def close(self) -> None:
        """Store the remaining records."""
        self._lines.close()


def read_metrics(run: Folder) -> list[dict[str, Any]]:
    """Read a run's records in the order of steps, each step as its youngest attempt logged it."""
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


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None in a JSON value."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
