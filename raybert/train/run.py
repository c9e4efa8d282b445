"""A run on one worker: builds its task and loop, trains, and writes the finished model."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

import torch

from raybert.cluster.machine import describe_machine, keep_freed_memory
from raybert.errors import StorageError
from raybert.storage.folder import Folder
from raybert.storage.retry import retry
from raybert.train.attempts import begin_attempt, check_attempt
from raybert.train.checkpoint import CheckpointStore
from raybert.train.checkpoint_saver import resume_hint
from raybert.train.control import NO_SIGNALS, ControlSignals, Stopped
from raybert.train.distributed import Group, use_threads
from raybert.train.line_log import LineLog
from raybert.train.loop import Loop
from raybert.train.metrics_log import finite, merge_metrics
from raybert.train.run_folder import DIGESTS, RESULT
from raybert.train.settings import TrainConfig
from raybert.train.task import Batch, LoaderConfig, TrainSpec


class TrainingRun:
    """A run on this worker: to its end, or from evaluation to evaluation."""

    def __init__(
        self,
        spec: TrainSpec,
        run: Folder,
        attempt: int,
        group: Group,
        loader: LoaderConfig,
        *,
        workers_here: int = 1,
        on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
        signals: ControlSignals = NO_SIGNALS,
    ) -> None:
        """Build the task and its loop.

        Args:
            spec: what is trained.
            run: the run's folder.
            attempt: the attempt's number, under which this run may commit.
            group: the processes that train together.
            loader: where batches are made.
            workers_here: how many of the group share the cores of this machine.
            on_progress: gets every logged record, on rank 0.
            signals: requests to stop, to make room, to save.
        """
        config = spec.config
        self._spec, self._run, self._group = spec, run, group
        self._threads = use_threads(config.threads, workers_here)
        if group.device.type == "cpu":
            keep_freed_memory()
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        self.task = spec.make_task(group, loader)
        self._store = CheckpointStore(run, attempt, config.keep_checkpoints)
        name = f"{attempt:04d}-{group.rank:04d}.txt"
        self._digests = LineLog(run / DIGESTS, name, lambda text: self.loop.log.storage_event(text))
        self.loop = Loop(
            self.task,
            config,
            group,
            self._store,
            on_record=on_progress,
            signals=signals,
            on_batch=self._write_digest if config.digests else None,
            before_save=self._digests.flush,
        )
        self.result: dict[str, Any] = {}  # of a finished run, on rank 0
        self._evaluations = self._train()

    def run(self) -> dict[str, Any]:
        """Train to the end; on rank 0 write the finished model, and return the result.

        Raises:
            StorageError: they could not be written for `retry_timeout_s`; the message says from
                where the run goes on.
            RaybertError: as `Loop.run`.
        """
        while self.advance() is not None:
            pass
        return self.result

    def advance(self) -> dict[str, Any] | None:
        """Train up to the next evaluation and return its record; None: the run is finished.

        Raises:
            StorageError, RaybertError: as `run`.
        """
        return next(self._evaluations, None)

    def close(self) -> None:
        """End the run where it is paused; its checkpoints stay."""
        self._evaluations.close()

    def _write_digest(self, batch: Batch) -> None:
        self._digests.write(f"{batch.step} {batch.micro_batch_index} {batch.digest()}")

    def _train(self) -> Generator[dict[str, Any], None, None]:
        with closing(self._digests):
            outcome = yield from self.loop.evaluations()
        if self._group.rank == 0:
            timeout_s, log = self._spec.config.retry_timeout_s, self.loop.log
            try:
                self.result = retry(lambda: self._finish(outcome), timeout_s, log.storage_event)
            except StorageError as error:
                raise StorageError(f"{error}; {resume_hint(self._store.last)}") from None
        self._group.gather(None)  # no rank ends before the result is written

    def _finish(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """Write the finished model and the result."""
        run, attempt = self._run, self._store.attempt
        check_attempt(run, attempt)  # training may have ended minutes ago, for want of the storage
        self.task.last = outcome  # the metrics of the weights that the model has now
        result: dict[str, Any] = finite(
            {
                **outcome,
                **self._spec.finish(self.task, run),
                "tokens_per_second": round(outcome["tokens"] / max(1e-9, outcome["seconds"]), 1),
                "machine": describe_machine(
                    self._group.device, workers=self._group.world_size, threads=self._threads
                ),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        check_attempt(run, attempt)  # again: writing the model may have taken minutes
        merge_metrics(run)
        run.write_json(RESULT, result)
        return result


def train_in_process(
    spec: TrainSpec, run: Folder, *, on_progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train in this process, without Ray, and return the result.

    Raises:
        KeyboardInterrupt: after Ctrl-C; a checkpoint of the last step is written, or, where that
            was the run's last one, the result.
        RaybertError: as `TrainingRun.run`.
    """
    device = torch.device("cuda" if _wants_gpu(spec.config) else "cpu")
    attempt = begin_attempt(run, spec.config.retry_timeout_s)
    group = Group(device=device)
    try:
        with _interruptible() as is_interrupted:
            result = TrainingRun(
                spec,
                run,
                attempt,
                group,
                LoaderConfig(),
                on_progress=on_progress,
                signals=ControlSignals(stop=is_interrupted),
            ).run()
    except Stopped:
        raise KeyboardInterrupt from None
    if is_interrupted():
        raise KeyboardInterrupt
    return result


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C a request to save and stop; the second one interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # can't handle signals
        yield interrupted.is_set
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _wants_gpu(config: TrainConfig) -> bool:
    return config.gpu == "yes" or (config.gpu == "auto" and torch.cuda.is_available())
