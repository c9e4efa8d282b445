"""Where a trial trains: in the process that Ray Tune gives it, or in workers of Ray Train.

A trial of one worker trains in Ray Tune's process, which stays warm for the next one. One of
several workers is a Ray Train run that this process starts and follows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch

from raybert.cluster.session import Resources
from raybert.storage.folder import Folder
from raybert.tasks.classification import FinetuneSpec, SharedInputs
from raybert.train.checkpoint import CheckpointStore, hash_tensors
from raybert.train.distributed import Group
from raybert.train.ray.driver import train_on_ray
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.run import LoaderConfig, TrainingRun
from raybert.train.task import ControlSignals

_POLL_SECONDS = 0.5
Report = Callable[[dict[str, Any]], None]


class Run(Protocol):
    """A trial's run, wherever it trains."""

    def advance(self) -> dict[str, Any] | None:
        """Train up to the next evaluation and return its record; None: the run is over."""

    def save(self) -> int:
        """Save it where it stands; returns the step."""

    def weights(self) -> str:
        """A hash of the weights as they were saved."""

    def close(self) -> None:
        """Leave it as it stands."""


def start_run(
    job: FinetuneSpec,
    folder: Folder,
    attempt: int,
    held: SharedInputs,
    *,
    gpu: bool,
    resources: Resources,
    report: Report,
    is_stopping: Callable[[], bool],
) -> Run:
    """Start a trial's run, or go on with it.

    Args:
        job: what is trained.
        folder: of the run.
        attempt: its number.
        held: what runs of one process share; those of Ray Train's workers read for themselves.
        gpu: whether this process has one.
        resources: what the cluster has.
        report: gets every logged record.
        is_stopping: whether all trials are to stop.
    """
    if job.config.max_workers > 1:
        return _OnRay(job, folder, resources, report, is_stopping)
    return _Here(
        replace(job, held=held), folder, attempt, gpu, report, ControlSignals(stop=is_stopping)
    )


class _Here:
    """A run in this process."""

    def __init__(
        self,
        job: FinetuneSpec,
        folder: Folder,
        attempt: int,
        gpu: bool,
        report: Report,
        signals: ControlSignals,
    ) -> None:
        group = Group(device=torch.device("cuda" if gpu else "cpu"))
        self._execution = TrainingRun(
            job, folder, attempt, group, LoaderConfig(), on_progress=report, signals=signals
        )
        self._execution.loop.resume()

    def advance(self) -> dict[str, Any] | None:
        return self._execution.advance()

    def save(self) -> int:
        self._execution.loop.save()
        return self._execution.loop.progress.step

    def weights(self) -> str:
        return hash_tensors(self._execution.loop.task.model.state_dict())

    def close(self) -> None:
        self._execution.close()


class _OnRay:
    """A run of several workers: Ray Train's, until it is over or has to stand still.

    Workers don't wait at an evaluation, for what is decided about it takes milliseconds, and their
    start takes many seconds. They are stopped where a scheduler wants the run's state.
    """

    def __init__(
        self,
        job: FinetuneSpec,
        folder: Folder,
        resources: Resources,
        report: Report,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._job, self._folder, self._resources = job, folder, resources
        self._report, self._is_stopping = report, is_stopping
        self._store = CheckpointStore(folder, 0, 1)
        self._found: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        self._board = DriverChannel()
        self._thread: threading.Thread | None = None

    def advance(self) -> dict[str, Any] | None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
            self._thread.start()
        while True:
            with suppress(queue.Empty):
                found = self._found.get(timeout=_POLL_SECONDS)
                if isinstance(found, Exception):
                    raise found
                return found
            if self._is_stopping():
                self._board.stop()

    def save(self) -> int:
        self.close()
        return max(self._store.steps(), default=0)

    def weights(self) -> str:
        snapshot = self._store.load_latest(lambda text: None)
        return "" if snapshot is None else hash_tensors(snapshot.model)

    def close(self) -> None:
        if self._thread is not None:
            self._board.stop()
            self._thread.join()
            self._thread, self._board = None, DriverChannel()
            self._found = queue.Queue()

    def _train(self) -> None:
        found, board = self._found, self._board

        def note(record: dict[str, Any]) -> None:
            self._report(record)
            if record["kind"] == "eval":
                found.put(record)

        try:
            train_on_ray(self._job, self._folder, self._resources, on_progress=note, channel=board)
            found.put(None)
        except Exception as error:  # raised by `advance`, in the trial's own thread
            found.put(error)
