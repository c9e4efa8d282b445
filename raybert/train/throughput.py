"""The stream of a run's batches with its clock, and the throughput.

Model FLOPs utilization (MFU) is defined as in PaLM (arXiv 2204.02311, appendix B): it counts only
the operations that the model itself needs, so that recomputation does not raise it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from raybert.errors import RaybertError
from raybert.records import RankTimes, Rates
from raybert.train.distributed import Group
from raybert.train.peaks import gpu_peak_flops as gpu_peak_flops
from raybert.train.peaks import peak_flops as peak_flops
from raybert.train.state import Progress
from raybert.train.task import Batch, Task


class ThroughputMeter:
    """Tokens per second and seconds of waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self._began, self._tokens, self._waited, self._steps = time.perf_counter(), 0.0, 0.0, 0
        self._worked = 0.0

    def add(self, tokens: float, waited: float, worked: float = 0.0) -> None:
        """Count a step: its tokens over all ranks, and this rank's seconds.

        `waited` for the step's data, and `worked` on it before the ranks wait for each other.
        """
        self._tokens += tokens
        self._waited += waited
        self._worked += worked
        self._steps += 1

    def own_seconds(self) -> tuple[float, float]:
        """The interval's seconds a step of this rank: of waiting for data, and of that and work."""
        steps = max(1, self._steps)
        return self._waited / steps, (self._waited + self._worked) / steps

    def read(self) -> Rates:
        """Return the interval's rates and begin the next interval."""
        seconds = max(1e-9, time.perf_counter() - self._began)
        steps = max(1, self._steps)
        rates: Rates = {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "step_seconds": round(seconds / steps, 6),
            "data_wait": round(self._waited / steps, 6),
        }
        self.restart()
        return rates


class Stopwatch:
    """Seconds of work that a device was given, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = [None, None]

    def start(self) -> None:
        """Mark the begin."""
        self._marks[0] = self._mark()

    def stop(self) -> None:
        """Mark the end."""
        self._marks[1] = self._mark()

    def seconds(self) -> float:
        """The seconds between the marks; on a GPU after its work is done, as by `.item()`."""
        begin, end = self._marks
        return float(begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def slowest_ranks(group: Group, meter: ThroughputMeter) -> RankTimes:
    """Compare the ranks' own seconds a step; all ranks call it together."""
    waited, worked = meter.own_seconds()
    size, rank = group.world_size, group.rank
    mine = [0.0] * (2 * size)
    mine[rank], mine[size + rank] = waited, worked
    seconds = group.sum(mine)
    return {
        "data_wait_max": round(max(seconds[:size]), 6),
        "data_wait_rank": max(range(size), key=seconds[:size].__getitem__),
        "own_seconds": round(sum(seconds[size:]) / size, 6),
        "own_seconds_max": round(max(seconds[size:]), 6),
        "own_seconds_rank": max(range(size), key=seconds[size:].__getitem__),
    }


class BatchStream:
    """This rank's micro-batches, step after step; the clock starts with the first one."""

    def __init__(self, task: Task, progress: Progress, meter: ThroughputMeter) -> None:
        self._task, self._progress, self._meter = task, progress, meter
        self._batches: Iterator[Sequence[Batch]] | None = None
        self._began = 0.0
        self.waited = 0.0  # seconds for the last batch

    def next(self) -> Sequence[Batch]:
        """The micro-batches of the next step; RaybertError if they are of another."""
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
        for batch in batches:
            if batch.step != progress.step:
                raise RaybertError(
                    f"the loader returned a micro-batch of step {batch.step}, expected "
                    f"{progress.step}; run it again to resume from the last checkpoint"
                )
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
