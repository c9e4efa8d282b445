"""What happens when a worker is lost: the run restarts from its last checkpoint, or gives up.

Ray Train's own policy gives up after a fixed number of failures, so that a run of weeks ends with
its ninth lost node. This one counts only restarts in a row that reached no new checkpoint.
"""

from __future__ import annotations

from contextlib import suppress

from ray.train import FailureConfig, TrainingFailedError

from raybert.cluster.internals.train_controller import FailureDecision, FailurePolicy
from raybert.errors import StorageError
from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.failures import format_failure, is_loss_of_nodes


class FailureContext:
    """What the policies need: the run's last checkpoint, and the channel to its workers and user.

    It lives in Ray Train's controller, which is a process of its own.
    """

    def __init__(self, run: Folder, channel: DriverChannel) -> None:
        self._run, self.channel = run, channel
        self._step = 0

    def last_step(self) -> int:
        """The step of the latest checkpoint; the last known one while the storage fails."""
        with suppress(StorageError):
            self._step = max(CheckpointStore(self._run, 0, 1).steps(), default=0)
        return self._step

    def send_event(self, event: str, message: str) -> None:
        """Show a line where the run is followed; a head that does not answer is no failure."""
        with suppress(Exception):
            self.channel.send_event(event, message, self._step)


class NoProgressFailurePolicy(FailurePolicy):  # type: ignore[misc]  # of an untyped package
    """Restarts the workers until `max_failures` restarts in a row reached no new checkpoint."""

    def __init__(self, failure_config: FailureConfig, context: FailureContext) -> None:
        super().__init__(failure_config)
        self._context = context
        self._failures = 0  # in a row
        self._last_step = 0  # at the first of them

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Decide whether the workers are started again, and report it."""
        step = self._context.last_step()
        message = f"{format_failure(training_failed_error)}: starting again from step {step:,}"
        if is_loss_of_nodes(training_failed_error):
            self._context.send_event("restart", message)
            return FailureDecision.RETRY
        if step > self._last_step:
            self._failures, self._last_step = 0, step
        self._failures += 1
        limit = self.failure_config.max_failures
        if self._failures > limit:
            return FailureDecision.RAISE
        if self._failures > 1:
            message += f", for the {_ordinal(self._failures)} time of at most {limit}"
        self._context.send_event("restart", message)
        return FailureDecision.RETRY


def _ordinal(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")
