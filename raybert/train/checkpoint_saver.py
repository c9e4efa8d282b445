"""When a run's checkpoints are written, and what happens when one can't be.

Rank 0 writes, in the background. The other ranks wait with it where it has to wait, in short
collectives, or they would take it for lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from raybert.errors import StorageError, UserError
from raybert.train.checkpoint import CheckpointStore, Snapshot
from raybert.train.distributed import Group
from raybert.train.metrics_log import MetricsLog
from raybert.train.settings import TrainConfig
from raybert.train.state import Progress
from raybert.train.task import Stopped

RETRY_SECONDS = 60.0  # after a failure, unless a checkpoint is due before


class CheckpointSaver:
    """Writes the checkpoints of a run; all ranks have one, rank 0's writes."""

    def __init__(
        self, store: CheckpointStore, group: Group, config: TrainConfig, log: MetricsLog
    ) -> None:
        self._store = store if group.rank == 0 else None
        self._group, self._config, self._log = group, config, log
        self._last_began = time.perf_counter()
        self._saved: tuple[Any, ...] | None = None  # the state in the last checkpoint
        self._stalled = 0.0  # seconds that the last checkpoint kept training waiting
        self._retry_at = math.inf  # when to try again after a failure
        self._is_failing = False  # whether a failure was reported and none succeeded since
        self._fatal: UserError | None = None  # the failure that must end the run

    @property
    def has_failed(self) -> bool:
        """Whether a failure must end the run."""
        return self._fatal is not None

    def resume_from(self, progress: Progress) -> None:
        """Note that this state is in a checkpoint."""
        self._saved = _state_to_save(progress)

    def is_due(self, step: int) -> bool:
        """Whether to write a checkpoint now, on rank 0."""
        every, minutes = self._config.checkpoint_steps, self._config.checkpoint_minutes
        if self._store is None or step == 0:
            return False
        if step in self._config.kept_steps or (every is not None and step % every == 0):
            return True
        if self._store.is_busy:  # a save would have to wait for the one before
            return False
        due = self._last_began + minutes * 60 if minutes is not None else math.inf
        return time.perf_counter() >= min(due, self._retry_at)

    def save(
        self, progress: Progress, snapshot: Callable[[], Snapshot], *, began: float, wait: bool
    ) -> None:
        """Write a checkpoint unless the last is equal; training waits since `began`; all ranks."""
        self.wait_on_all_ranks()
        self._last_began = began
        self._begin_write(progress, snapshot)
        if wait:
            self.wait_on_all_ranks()
            self.log_committed()

    def _begin_write(self, progress: Progress, snapshot: Callable[[], Snapshot]) -> None:
        self.log_committed()
        state = _state_to_save(progress)
        is_wanted = self._store is not None and not self.has_failed and self._saved != state
        if not self._group.sum([is_wanted])[0]:
            return
        copied = snapshot()  # on all ranks: each may have a part
        if self._store is None:
            return
        self._saved, self._retry_at = state, math.inf
        try:
            self._store.save(copied, best_step=progress.best_step)
            self._stalled = time.perf_counter() - self._last_began
        except StorageError as error:
            self._note_failure(error)

    def wait(self) -> None:
        """Wait for the last checkpoint on rank 0 alone; a StorageError if it can't be written."""
        if self._store is not None:
            self._store.wait()
            self.log_committed()

    def wait_on_all_ranks(self) -> None:
        """Wait for the last checkpoint, however long a slow storage takes."""
        seconds = self._config.collective_timeout_s / 4
        while self._group.sum([self._is_busy_after(seconds)])[0]:
            pass

    def _is_busy_after(self, seconds: float) -> bool:
        """Wait for the last checkpoint for some seconds; whether it is still being written."""
        if self._store is None:
            return False
        try:
            self._store.wait(seconds)
        except StorageError as error:
            self._note_failure(error)
        return self._store.is_busy

    def check_last_save(self) -> bool:
        """Check the last save; return True if its failure must end the run."""
        store = self._store
        if store is None:
            return False
        try:
            store.check()
        except StorageError as error:
            self._note_failure(error)
        if self._is_failing and not store.is_failing:
            self._is_failing = False
            self._log.event(
                "checkpoint written", f"the checkpoint of step {store.last:,} is written"
            )
        return self.has_failed

    def raise_if_failed(self, has_failed: float) -> None:
        """End the run if any rank `has_failed`: UserError on rank 0, Stopped on the others."""
        if has_failed:
            raise self._fatal or Stopped("rank 0 could not write a checkpoint")

    def log_committed(self) -> None:
        """Log what the last checkpoint took, once it is committed; from the training thread."""
        record = None if self._store is None else self._store.take_committed()
        if record is not None:
            record["stalled"] = round(self._stalled, 4)
            self._log.write(record)

    def _note_failure(self, error: StorageError) -> None:
        """Report a failure and schedule another try, or keep it as the error that ends the run."""
        assert self._store is not None
        self._saved, self._retry_at = None, time.perf_counter() + RETRY_SECONDS
        last, section = self._store.last, self._config.section
        if self._config.on_checkpoint_failure == "stop":
            self._fatal = UserError(
                f"{error}; {resume_hint(last)}, or set {section}.on_checkpoint_failure=continue "
                "to train on without"
            )
        elif not self._is_failing:  # reported once for failures in a row
            self._is_failing = True
            kept = "there is none before it" if last is None else f"that of step {last:,} is kept"
            self._log.event(
                "checkpoint failed", f"{error}; {kept}; the next try is within a minute"
            )


def _state_to_save(progress: Progress) -> tuple[Any, ...]:
    """What makes a new checkpoint worth writing: all that differs from the last but the clocks."""
    return progress.step, progress.total_steps, progress.minutes, progress.best_step


def resume_hint(last: int | None) -> str:
    """The end of a message about the storage: the last checkpoint's step, and how to go on."""
    if last is None:
        return "there is no checkpoint yet: fix the storage, and run it again"
    return f"fix the storage, and run it again to resume from the checkpoint of step {last:,}"
