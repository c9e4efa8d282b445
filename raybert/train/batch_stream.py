"""The stream of a run's batches, with the clock of its training time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from raybert.train.state import Progress
from raybert.train.task import Batch, Task
from raybert.train.throughput import ThroughputMeter


class BatchStream:
    """This rank's micro-batches, step after step.

    The clock starts with the first batch: start-up is not training.
    """

    def __init__(self, task: Task, progress: Progress, meter: ThroughputMeter) -> None:
        """Set up; the stream opens at the first `next`, which also restarts the meter."""
        self._task, self._progress, self._meter = task, progress, meter
        self._batches: Iterator[Sequence[Batch]] | None = None
        self._began = 0.0
        self.waited = 0.0  # seconds for the last batch

    def next(self) -> Sequence[Batch]:
        """The micro-batches of the next step."""
        progress = self._progress
        if self._batches is None:
            self._batches = self._task.batches(progress.step, progress.total_steps)
            batches = next(self._batches)
            self._meter.restart()
            self._began, self.waited = time.perf_counter() - progress.seconds, 0.0
        else:
            asked = time.perf_counter()
            batches = next(self._batches)
            self.waited = time.perf_counter() - asked
        return batches

    def seconds(self) -> float:
        """Seconds of training so far, over all attempts."""
        return time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for as long as the context lasts."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - paused

    def close(self) -> None:
        """End the stream and what makes its batches; `next` would open it anew."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]  # of a generator
            self._batches = None
