"""When a run's checkpoints are written, and what follows where one can't be."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from raybert.errors import StorageError, UserError
from raybert.train.checkpoint import CheckpointStore, Snapshot
from raybert.train.settings import TrainConfig
from raybert.train.task import Stopped

RETRY_SECONDS = 60.0  # until a checkpoint that failed is tried again, where none is due before


class CheckpointSaver:
    """Writes the checkpoints of a run; on ranks without a store it does nothing."""

    def __init__(
        self,
        store: CheckpointStore | None,
        config: TrainConfig,
        write: Callable[[dict[str, Any]], None],
        tell: Callable[[str, str], None],
    ) -> None:
        """Begin an attempt.

        Args:
            store: where they go; None on all ranks but the first, and where nothing is to be kept.
            config: when they are due, and whether a run may go on without.
            write: logs a record.
            tell: logs an event, by its name and message.
        """
        self._store, self._config = store, config
        self._write, self._tell = write, tell
        self._since = time.perf_counter()
        self._saved: tuple[Any, ...] | None = None  # the state that the last one has
        self._stalled = 0.0  # seconds that training stood still for it
        self._retry_at = math.inf  # when to try again after a failure
        self._is_failing = False  # whether it was told that they fail
        self._broken: UserError | None = None  # the failure that ends the run

    @property
    def has_failed(self) -> bool:
        """Whether a failure is to end the run."""
        return self._broken is not None

    def begin(self, state: tuple[Any, ...]) -> None:
        """Go on from a checkpoint of this state."""
        self._saved = state

    def is_due(self, step: int) -> bool:
        """Whether to write one now."""
        every, minutes = self._config.checkpoint_steps, self._config.checkpoint_minutes
        if self._store is None or step == 0:
            return False
        if every is not None and step % every == 0:
            return True
        if self._store.is_busy:  # no reason to stand still until it is written
            return False
        due = self._since + minutes * 60 if minutes is not None else math.inf
        return time.perf_counter() >= min(due, self._retry_at)

    def save(
        self,
        state: tuple[Any, ...],
        snapshot: Callable[[], Snapshot],
        *,
        best_step: int | None,
        begun: float,
    ) -> None:
        """Write a checkpoint in the background, unless the last one has the same state.

        Args:
            state: what makes it worth writing.
            snapshot: copies the run's state; training stands still meanwhile.
            best_step: the step of the best weights, which are kept.
            begun: since when training has stood still for it, by `perf_counter`.
        """
        self._since = begun
        if self._store is None:
            return
        self.is_settled(None)  # what went wrong with the one before must not cost this one
        self.log()
        if self.has_failed or self._saved == state:
            return
        self._saved, self._retry_at = state, math.inf
        try:
            self._store.save(snapshot(), best_step=best_step)
            self._stalled = time.perf_counter() - begun
        except StorageError as error:
            self._failed(error)

    def is_settled(self, seconds: float | None) -> bool:
        """Wait for the checkpoint that is being written; whether it is done in so many seconds."""
        if self._store is None:
            return True
        try:
            self._store.wait(seconds)
        except StorageError as error:
            self._failed(error)
        return not self._store.is_busy

    def wait(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            StorageError: it could not be written.
        """
        if self._store is not None:
            self._store.wait()
            self.log()

    def check_last_save(self) -> bool:
        """Hear how the last one went; return whether its failure is to end the run."""
        store = self._store
        if store is None:
            return False
        try:
            store.check()
        except StorageError as error:
            self._failed(error)
        if self._is_failing and not store.is_failing:
            self._is_failing = False
            self._tell("checkpoint written", f"the checkpoint of step {store.last:,} is written")
        return self.has_failed

    def raise_if_failed(self, broken: float) -> None:
        """End the run on all ranks, if the first could not write a checkpoint; it has the reason.

        Raises:
            UserError: on the first rank.
            Stopped: on the others.
        """
        if broken:
            raise self._broken or Stopped("rank 0 could not write a checkpoint")

    def log(self) -> None:
        """Log what the last checkpoint took, once it is committed; from the training thread."""
        done = None if self._store is None else self._store.take_committed()
        if done is not None:
            self._write(
                {
                    "kind": "checkpoint",
                    "step": done.step,
                    "stalled": round(self._stalled, 4),
                    "written": round(done.seconds, 4),
                    "bytes": done.size,
                }
            )

    def _failed(self, error: StorageError) -> None:
        """Say so, and see to the next one; or keep the error that is to end the run."""
        assert self._store is not None
        self._saved, self._retry_at = None, time.perf_counter() + RETRY_SECONDS
        last, section = self._store.last, self._config.section
        if self._config.on_checkpoint_failure == "stop":
            self._broken = UserError(
                f"{error}; {resume_hint(last)}, or set {section}.on_checkpoint_failure=continue "
                "to train on without"
            )
        elif not self._is_failing:  # once for all that fail in a row
            self._is_failing = True
            kept = "there is none before it" if last is None else f"that of step {last:,} is kept"
            self._tell("checkpoint failed", f"{error}; {kept}; the next try is within a minute")


def resume_hint(last: int | None) -> str:
    """What is safe, and how a run goes on: the end of a message about its storage.

    Args:
        last: the step of the last whole checkpoint.
    """
    if last is None:
        return "there is no checkpoint yet: mend the storage, and run it again"
    return (
        f"the checkpoint of step {last:,} is whole: mend the storage, and run it again to go on "
        "from there"
    )
