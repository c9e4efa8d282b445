"""A run on one worker: builds its task and loop, trains, and writes the finished model."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from typing import Any

import torch

from raybert.cluster.interrupts import deferred
from raybert.cluster.machine import describe_machine, keep_freed_memory
from raybert.errors import StorageError
from raybert.records import EvalRecord, OnRecord, finite, ignore_record
from raybert.storage.folder import Folder
from raybert.storage.retry import retry
from raybert.train.checkpoint import CheckpointStore
from raybert.train.checkpoint_saver import resume_hint
from raybert.train.distributed import Group, use_threads
from raybert.train.line_log import LineLog
from raybert.train.loop import Loop
from raybert.train.memory import advise_on_memory
from raybert.train.metrics_log import merge_metrics
from raybert.train.run_folder import DIGESTS, RESULT, begin_attempt, check_attempt
from raybert.train.settings import TrainConfig
from raybert.train.task import NO_SIGNALS, Batch, ControlSignals, LoaderConfig, Stopped, TrainSpec


class TrainingRun:
    """A run on this worker: to its end, or from evaluation to evaluation."""

    def __init__(
        self,
        spec: TrainSpec,
        run: Folder,
        attempt: int,
        group: Group,
        loader: LoaderConfig = LoaderConfig(),  # noqa: B008 - immutable
        *,
        workers_here: int = 1,
        on_progress: OnRecord = ignore_record,
        signals: ControlSignals = NO_SIGNALS,
    ) -> None:
        """Build the task and its loop; `workers_here` of the group share this machine's cores."""
        config = spec.config
        self._spec, self._run, self._group = spec, run, group
        self._threads = use_threads(config.threads, workers_here)
        if group.device.type == "cpu":
            keep_freed_memory()
        else:
            torch.set_float32_matmul_precision("high")  # TF32 where products are in fp32
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        # Ranks may read the data and the model to start from at very different speeds.
        with advise_on_memory(config, group.device):
            self.task = group.wait_for(
                lambda: spec.make_task(group, loader), config.collective_timeout_s
            )
        self._store = CheckpointStore(run, attempt, config.keep_checkpoints, config.kept_steps)
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
        """Train to the end; rank 0 writes the model and returns the result. Raises as the loop."""
        while self.advance() is not None:
            pass
        return self.result

    def advance(self) -> EvalRecord | None:
        """Train up to the next evaluation and return its record; None: the run is finished."""
        return next(self._evaluations, None)

    def close(self) -> None:
        """End the run where it is paused; its checkpoints stay."""
        self._evaluations.close()

    def _write_digest(self, batch: Batch) -> None:
        self._digests.write(f"{batch.step} {batch.micro_batch_index} {batch.digest()}")

    def _train(self) -> Generator[EvalRecord, None, None]:
        with closing(self._digests), advise_on_memory(self._spec.config, self._group.device):
            try:
                outcome = yield from self.loop.evaluations()
            except BaseException:
                self.loop.log.leave_trackers()
                raise

        def finish() -> None:
            if self._group.rank > 0:
                return
            timeout_s, log = self._spec.config.retry_timeout_s, self.loop.log
            try:
                self.result = retry(lambda: self._finish(outcome), timeout_s, log.storage_event)
            except StorageError as error:
                raise StorageError(f"{error}; {resume_hint(self._store.last)}") from None

        # No rank ends before the result is written.
        self._group.wait_for(finish, self._spec.config.collective_timeout_s)

    def _finish(self, outcome: dict[str, Any]) -> dict[str, Any]:
        run, attempt = self._run, self._store.attempt
        check_attempt(run, attempt)  # training may have ended minutes ago, for want of the storage
        result: dict[str, Any] = finite(
            {
                **outcome,
                **self._spec.finish(self.task, run, outcome),
                "tokens_per_second": round(outcome["tokens"] / max(1e-9, outcome["seconds"]), 1),
                "machine": describe_machine(
                    self._group.device, workers=self._group.world_size, threads=self._threads
                ),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        check_attempt(run, attempt)  # again: writing the model may have taken minutes
        message = merge_metrics(run)
        if message is not None:
            self.loop.log.event("damaged log", message)
        run.write_json(RESULT, result)
        self.loop.log.finish_trackers(result)
        return result


def train_in_process(spec: TrainSpec, run: Folder, *, on_progress: OnRecord) -> dict[str, Any]:
    """Train in this process, without Ray; KeyboardInterrupt after Ctrl-C and a checkpoint."""
    device = torch.device("cuda" if _wants_gpu(spec.config) else "cpu")
    attempt = begin_attempt(run, spec.config.retry_timeout_s)
    group = Group(device=device)
    polls = 0
    interrupted: threading.Event | None = None

    def is_interrupted() -> bool:
        """Asked before every step: until the first one is taken, there is nothing to save."""
        nonlocal polls, interrupted
        polls += 1
        if polls == 2:
            interrupted = contexts.enter_context(deferred())
        return interrupted is not None and interrupted.is_set()

    signals = ControlSignals(stop=is_interrupted)
    try:
        with ExitStack() as contexts:
            training = TrainingRun(
                spec, run, attempt, group, on_progress=on_progress, signals=signals
            )
            return training.run()
    except Stopped:
        raise KeyboardInterrupt from None


def _wants_gpu(config: TrainConfig) -> bool:
    return config.gpu == "yes" or (config.gpu == "auto" and torch.cuda.is_available())
