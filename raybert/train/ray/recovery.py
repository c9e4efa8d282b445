"""What happens when a worker dies, and how many workers a run has.

1. Ray Train's controller, an actor, notices: a worker's process ended, or it did not answer for
   `collective_timeout_s`. The other workers' collectives time out after the same time; the
   controller ends them and waits 10 s for their process group (`cluster/internals/train.py`).
2. `NoProgressFailurePolicy` decides: the workers start again, or the run ends with the error.
   `failures.py` finds the cause. Lost nodes that Ray had notice of do not count.
3. `ElasticPolicy` chooses the number of workers, where the run has a range of them.
4. Each new worker calls `train_worker`, whose loop loads the last checkpoint and repeats the steps
   since then, with the same batches. After an error that no restart mends, which a worker reports
   by `channel.fail`, it returns at once and the driver raises the error.

The driver uses these policies if the installed Ray has the private names that they need, else Ray
Train's own. Those end a run of weeks with its ninth lost node, because they count all failures, and
resize the workers without a checkpoint, so that every node that joins costs minutes of work.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError

from raybert.cluster.internals.core import draining_nodes
from raybert.cluster.internals.train_controller import (
    FailureDecision,
    FailurePolicy,
    NodeScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from raybert.errors import StorageError
from raybert.records import EventName
from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.failures import format_failure, is_loss_of_nodes

_SAVE_SECONDS = 60.0  # after which the checkpoint before a resize is requested again
_STILL_SECONDS = 25.0  # that the cluster must have had one size, before a resize
_REPORT_SECONDS = 30  # between two events that nodes are missing
_CONNECT_SECONDS = 2.0  # for a node to accept a connection
_CONNECTIONS = 32  # at a time


class FailureContext:
    """The run's last checkpoint and the channel to its workers and user, for the policies."""

    def __init__(self, run: Folder, channel: DriverChannel) -> None:
        self._run, self.channel = run, channel
        self._step = 0

    def last_step(self) -> int:
        """The step of the latest checkpoint; the last known one while the storage fails."""
        with suppress(StorageError):
            self._step = max(CheckpointStore(self._run, 0, 1).steps(), default=0)
        return self._step

    def send_event(self, event: EventName, message: str) -> None:
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
            message += f" (restart {self._failures} of at most {limit} without a new checkpoint)"
        self._context.send_event("restart", message)
        return FailureDecision.RETRY


class ElasticPolicy(NodeScalingPolicy):
    """Uses as many workers as the nodes that stay can hold; saves before each change.

    A change restarts the workers. It comes once the cluster has had one size for a while, and only
    where it makes the steps shorter: where the slowest rank gets fewer micro-batches.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        context: FailureContext,
        micro_batches: int | None = None,
    ) -> None:
        """Set up for a run of so many micro-batches a step; None: each worker helps."""
        super().__init__(scaling_config)
        self._context, self._micro_batches = context, micro_batches
        self._reported_at = float("-inf")
        self._possible, self._possible_since = 0, 0.0  # workers that there was room for, since when
        self._pending: ResizeDecision | None = None
        self._requested_at = 0.0  # when the checkpoint before a resize was requested
        self._step_before = 0  # of the latest checkpoint by then

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start with as many workers as there is room for."""
        self._pending = None
        decision = super().make_decision_for_non_running_worker_group()
        now = time.monotonic()
        if isinstance(decision, NoopDecision) and now - self._reported_at > _REPORT_SECONDS:
            self._reported_at = now
            workers = self.scaling_config.min_workers
            self._context.send_event(
                "waiting", f"waiting for nodes with room for {workers} workers"
            )
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Resize when nodes have joined: request a checkpoint first, and wait for it."""
        if self._pending is None:
            decision = super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
            if isinstance(decision, ResizeDecision) and self._helps(
                worker_group_state.num_workers, decision.num_workers
            ):
                self._pending, self._step_before = decision, self._context.last_step()
                self._request_save()
            return NoopDecision()
        self.keep_requesting()
        if self._context.last_step() <= self._step_before:  # it may take long to write
            if time.monotonic() - self._requested_at > _SAVE_SECONDS:
                self._request_save()
            return NoopDecision()
        decision, self._pending = self._pending, None
        self._context.send_event("resize", f"continuing with {decision.num_workers} workers")
        return decision

    def _helps(self, now: int, then: int) -> bool:
        """Whether a change shortens the steps, and the cluster has been still."""
        if time.monotonic() - self._possible_since < _STILL_SECONDS:
            return False
        if self._micro_batches is None:
            return True
        return math.ceil(self._micro_batches / then) < math.ceil(self._micro_batches / now)

    def _request_save(self) -> None:
        self._requested_at = time.monotonic()
        self._context.channel.request_save()

    def on_count(self, workers: int) -> None:
        """Note since when there has been room for so many workers."""
        if workers != self._possible:
            self._possible, self._possible_since = workers, time.monotonic()

    def usable_cpus(self) -> dict[str, float]:
        """The CPUs of the nodes that are alive and will stay, by node id.

        Ray's coordinator may be 20 seconds behind, and the head itself up to a minute.
        """
        leaving = draining_nodes()
        listed = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            reachable = threads.map(accepts_connections, listed)
        return {
            node["NodeID"]: node["Resources"].get("CPU", 0)
            for node, is_reachable in zip(listed, reachable, strict=True)
            if is_reachable
        }


def accepts_connections(node: Mapping[str, Any]) -> bool:
    """Whether a node, as `ray.nodes` describes it, accepts connections.

    A node that is gone stays on Ray's list until some health checks have failed. Workers that are
    placed there in the meantime, or Ray Data's CPU for them, wait for it in vain.
    """
    try:
        with socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), _CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False
