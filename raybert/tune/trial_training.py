"""The training run of a trial: in Ray Tune's own process, or in Ray Train's workers.

A trial of one worker trains in the process that Ray Tune started, which is reused for the next
trial. A trial of several workers is a Ray Train run that this process starts and follows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from raybert.cluster.session import Resources
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec, SharedInputs
from raybert.train.checkpoint import CheckpointStore
from raybert.train.control import ControlSignals
from raybert.train.distributed import Group
from raybert.train.ray.driver import train_on_ray
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.run import TrainingRun
from raybert.train.task import LoaderConfig
from raybert.train.tensor_file import hash_tensors

_POLL_SECONDS = 0.5
OnProgress = Callable[[dict[str, Any]], None]


def start_run(
    spec: FinetuneSpec,
    folder: Folder,
    attempt: int,
    shared_inputs: SharedInputs,
    *,
    gpu: bool,
    resources: Resources,
    on_progress: OnProgress,
    is_stopping: Callable[[], bool],
) -> TrialRun:
    """Start or resume a trial's run; `on_progress` gets every logged record.

    The shared inputs are in this process's memory; Ray Train's workers read them from the storage.
    """
    if spec.config.max_workers > 1:
        return RayTrainTrialRun(spec, folder, resources, on_progress, is_stopping)
    signals = ControlSignals(stop=is_stopping)
    spec = replace(spec, shared=shared_inputs)
    return InProcessTrialRun(spec, folder, attempt, gpu, on_progress, signals)


class InProcessTrialRun:
    """A run in this process."""

    def __init__(
        self,
        spec: FinetuneSpec,
        folder: Folder,
        attempt: int,
        gpu: bool,
        on_progress: OnProgress,
        signals: ControlSignals,
    ) -> None:
        """Load the latest checkpoint of the run, if there is one."""
        group = Group(device=torch.device("cuda" if gpu else "cpu"))
        self._run = TrainingRun(
            spec, folder, attempt, group, LoaderConfig(), on_progress=on_progress, signals=signals
        )
        self._run.loop.resume()

    def advance(self) -> dict[str, Any] | None:
        """Train up to the next evaluation and return its record; None: the run has ended."""
        return self._run.advance()

    def save(self) -> int:
        """Save a checkpoint of the current step, and return the step."""
        self._run.loop.save()
        return self._run.loop.progress.step

    def hash_weights(self) -> str:
        """Hash the weights in memory."""
        return hash_tensors(self._run.loop.task.model.state_dict())

    def close(self) -> None:
        """Free the run's memory."""
        self._run.close()


class RayTrainTrialRun:
    """A Ray Train run of several workers.

    The workers do not wait at an evaluation: the scheduler decides in milliseconds, and a restart
    of the workers takes many seconds. They are stopped only when the scheduler wants a checkpoint.
    """

    def __init__(
        self,
        spec: FinetuneSpec,
        folder: Folder,
        resources: Resources,
        on_progress: OnProgress,
        is_stopping: Callable[[], bool],
    ) -> None:
        """Describe the run; its workers start with the first `advance`."""
        self._spec, self._folder, self._resources = spec, folder, resources
        self._on_progress, self._is_stopping = on_progress, is_stopping
        self._checkpoints = CheckpointStore(folder, 0, 1)
        self._evaluations: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        self._channel = DriverChannel()
        self._thread: threading.Thread | None = None

    def advance(self) -> dict[str, Any] | None:
        """Wait for the workers' next evaluation."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
            self._thread.start()
        while True:
            with suppress(queue.Empty):
                evaluation = self._evaluations.get(timeout=_POLL_SECONDS)
                if isinstance(evaluation, Exception):
                    raise evaluation
                return evaluation
            if self._is_stopping():
                self._channel.stop()

    def save(self) -> int:
        """Stop the workers, who save a checkpoint."""
        self.close()
        return max(self._checkpoints.steps(), default=0)

    def hash_weights(self) -> str:
        """Hash the weights of the latest checkpoint."""
        snapshot = self._checkpoints.load_latest(lambda text: None)
        return "" if snapshot is None else hash_tensors(snapshot.model)

    def close(self) -> None:
        """Stop the workers and wait for their end."""
        if self._thread is not None:
            self._channel.stop()
            self._thread.join()
            self._thread, self._channel = None, DriverChannel()
            self._evaluations = queue.Queue()

    def _train(self) -> None:
        evaluations, channel = self._evaluations, self._channel

        def on_record(record: dict[str, Any]) -> None:
            self._on_progress(record)
            if record["kind"] == "eval":
                evaluations.put(record)

        try:
            train_on_ray(
                self._spec, self._folder, self._resources, on_progress=on_record, channel=channel
            )
            evaluations.put(None)
        except Exception as error:  # raised by `advance`, in the trial's own thread
            evaluations.put(error)


TrialRun = InProcessTrialRun | RayTrainTrialRun
