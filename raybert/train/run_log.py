"""What a run reports while it trains: its records go to the metrics log and to a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raybert.train.metrics_log import MetricsLog
from raybert.train.state import Progress


class RunLog:
    """The records of a run, on rank 0; on other ranks it does nothing."""

    def __init__(
        self, progress: Progress, *, is_first: bool, on_record: Callable[[dict[str, Any]], None]
    ) -> None:
        """Set up; `is_first`: this is rank 0. `on_record` gets every record with `total_steps`."""
        self._progress, self._is_first = progress, is_first
        self.on_record = on_record
        self._metrics: MetricsLog | None = None

    @property
    def is_open(self) -> bool:
        """Whether records are written to a metrics log."""
        return self._metrics is not None

    def open(self, metrics: MetricsLog) -> None:
        """Write the records to a metrics log from now on."""
        self._metrics = metrics

    def write(self, record: dict[str, Any]) -> None:
        """Log a record."""
        if self._is_first:
            if self._metrics is not None:
                self._metrics.write(record)
            self.on_record({**record, "total_steps": self._progress.total_steps})

    def event(self, event: str, message: str) -> None:
        """Log an event of the current step."""
        step = self._progress.step
        self.write({"kind": "event", "step": step, "event": event, "message": message})

    def storage_event(self, message: str) -> None:
        """Log a message about the storage."""
        self.event("storage", message)

    def flush(self) -> None:
        """Store the records that were logged."""
        if self._metrics is not None:
            self._metrics.flush()

    def close(self) -> None:
        """Close the metrics log."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
