"""Prometheus metrics of a run: rank 0's records, exported through Ray.

Ray exports them from every node with the prefix `ray_`. Every process has its own series, which end
with it: queries aggregate by the label `run`, and a finished run raises no alert. Times are
exported as timestamps; queries compute their age. What alerts count are gauges that start at 0:
Ray exports no counter before its first increment.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from typing import Any

from raybert.records import EventName, Record, longest_data_wait
from raybert.storage.folder import Folder

PREFIX = "raybert_"
_SECONDS = 2.0  # between two exports of a gauge; Ray collects them every ten
GAUGES = {
    "step": "optimizer steps taken",
    "total_steps": "optimizer steps that the run will take",
    "loss": "training loss since the last line, nats",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient, before it is clipped",
    "tokens_per_second": "tokens that all workers together train on",
    "mfu": "model FLOPs utilization (0 to 1)",
    "step_seconds": "seconds of a step",
    "data_wait_share": "share of a step that the rank that waits longest waits for data",
    "data_wait_rank": "that rank",
    "own_seconds": "seconds a step before the ranks wait for each other, their mean",
    "own_seconds_max": "the same of the slowest rank",
    "own_seconds_rank": "that rank",
    "heldout": "the last evaluation; `measure` says what was measured",
    "workers": "processes that train",
    "restarts": "attempts at the run before this one",
    "skipped_steps": "steps that this attempt skipped because their gradient was not finite",
    "checkpoint_stalled_seconds": "seconds that training stood still for the last checkpoint",
    "checkpoint_written_seconds": "seconds that the last checkpoint took in the background",
    "checkpoint_bytes": "size of the last checkpoint",
    "checkpoint_failures": "checkpoints that this attempt could not write",
    "checkpoint_timestamp_seconds": "time of the last checkpoint, or of this attempt's start",
    "progress_timestamp_seconds": "time of the last steps or evaluation, or of the start",
}
#: Ray adds `_total` to the names of counters.
COUNTERS = {"stalled_seconds": "seconds that training stood still for checkpoints"}

#: Gauges with the names of the record's keys.
_TRAIN = (
    "step total_steps loss lr grad_norm tokens_per_second mfu step_seconds data_wait_rank "
    "own_seconds own_seconds_max own_seconds_rank"
).split()
_MEASURES = ("loss", "score", "accuracy")  # of every task, but the last
_TIMES = {  # by kind of record
    "train": "progress_timestamp_seconds",
    "eval": "progress_timestamp_seconds",
    "checkpoint": "checkpoint_timestamp_seconds",
}
_COUNTED: dict[EventName, str] = {
    "skipped step": "skipped_steps",
    "checkpoint failed": "checkpoint_failures",
}

Values = dict[tuple[str, str], float]  # of gauges, by name and the label `measure`, often ""


def gauge_values(record: Record) -> Values:
    """The gauges' values in a record, without those that are absent or not finite."""
    found: dict[tuple[str, str], Any] = {}
    if record["kind"] == "train":
        found = {(name, ""): record.get(name) for name in _TRAIN}
        wait, _ = longest_data_wait(record)
        found["data_wait_share", ""] = wait / max(1e-9, record["step_seconds"])
    elif record["kind"] == "eval":
        found = {("heldout", name): record.get(name) for name in _MEASURES}
    elif record["kind"] == "checkpoint":
        found["checkpoint_stalled_seconds", ""] = record["stalled"]
        found["checkpoint_written_seconds", ""] = record["written"]
        found["checkpoint_bytes", ""] = record["bytes"]
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


class PrometheusExporter:
    """The exported metrics of one attempt at a run, on rank 0."""

    def __init__(self, run: Folder, attempt: int, workers: int) -> None:
        from ray.util.metrics import Counter, Gauge

        label = {"run": "/".join(run.path.rstrip("/").split("/")[-2:])}  # experiment/stage
        self._gauges = {
            name: Gauge(
                PREFIX + name, text, ("run", "measure") if name == "heldout" else ("run",)
            ).set_default_tags(label)
            for name, text in GAUGES.items()
        }
        self._counters = {
            name: Counter(PREFIX + name, text, ("run",)).set_default_tags(label)
            for name, text in COUNTERS.items()
        }
        self._values: Values = {("workers", ""): workers, ("restarts", ""): attempt - 1}
        self._values.update({(name, ""): 0 for name in _COUNTED.values()})
        self._values.update({(name, ""): time.time() for name in _TIMES.values()})
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._export, name="exporter", daemon=True)
        self._thread.start()

    def report(self, record: Record) -> None:
        """Update the metrics from a record; no error in here may end a run."""
        with suppress(Exception):
            self._values.update(gauge_values(record))
            if record["kind"] in _TIMES:
                self._values[_TIMES[record["kind"]], ""] = time.time()
            if record["kind"] == "event" and record["event"] in _COUNTED:
                self._values[_COUNTED[record["event"]], ""] += 1
            if record["kind"] == "checkpoint":
                self._counters["stalled_seconds"].inc(record["stalled"])

    def close(self) -> None:
        """End the export."""
        self._closed.set()
        self._thread.join()

    def _export(self) -> None:
        """Set all gauges repeatedly: Ray drops each one once it has been collected."""
        while not self._closed.is_set():
            with suppress(Exception):
                for (name, measure), value in list(self._values.items()):
                    self._gauges[name].set(value, {"measure": measure} if measure else None)
            self._closed.wait(_SECONDS)
