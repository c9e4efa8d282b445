"""What a run on a cluster does about losses: when to try again, and with how many workers.

Ray Train's controller asks two policies. Its own give up after a fixed number of failures, so that
a run of weeks dies of the ninth lost node, and resize a group of workers without a checkpoint, so
that every node that comes costs the minutes since the last one. These here count only restarts that
came no further, wait for nodes as long as it takes, and save before they resize.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError

from raybert.cluster.session import Resources
from raybert.errors import StorageError
from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.distributed import use_interface_of
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.task import Preempted

_SAVE_SECONDS = 60  # for the checkpoint before a resize; without it, what came since is repeated
_TELL_SECONDS = 30  # between two lines that say that nodes are missing
_ANSWER_SECONDS = 2.0  # for a node to take a connection
_ASKED_AT_ONCE = 32  # nodes


class RestartingTrainer(TorchTrainer):  # type: ignore[misc]  # of an untyped package
    """TorchTrainer with policies of our own, and without helpers that a run has no use for.

    Each helper is one more process. The datasets' manager serves datasets given to the trainer;
    here every worker makes its own. The cleaner outlives a killed driver and frees what its run had
    reserved; on a Ray that ends with this process there is nothing to outlive, and it fails without
    Ray's dashboard.
    """

    def __init__(
        self, *args: Any, run: Folder, board: DriverChannel, resources: Resources, **more: Any
    ):
        super().__init__(*args, **more)
        self._losses = FailureContext(run, board)
        self._unused: tuple[type, ...] = (DatasetsCallback,)
        if resources.started_here:
            self._unused = (*self._unused, PlacementGroupCleanerCallback)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, self._unused)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = NoProgressFailurePolicy(
            self.run_config.failure_config, self._losses
        )
        if self.scaling_config.elasticity_enabled:
            given["scaling_policy"] = ElasticPolicy(self.scaling_config, self._losses)
        return super()._initialize_and_run_controller(**given)


class FailureContext:
    """What both policies know of the run, and their way to tell the user."""

    def __init__(self, run: Folder, board: DriverChannel) -> None:
        self._run, self.board = run, board
        self._step = 0

    def last_step(self) -> int:
        """The step of the youngest checkpoint; the last known one while the storage is away."""
        with suppress(StorageError):
            self._step = max(CheckpointStore(self._run, 0, 1).steps(), default=0)
        return self._step

    def tell(self, event: str, message: str) -> None:
        """Show a line where the run is followed; a head that does not answer can't be told."""
        with suppress(Exception):
            self.board.tell(event, message, self._step)


class NoProgressFailurePolicy(FailurePolicy):  # type: ignore[misc]
    """Tries again until `max_failures` restarts in a row came no further."""

    def __init__(self, failure_config: FailureConfig, losses: FailureContext) -> None:
        super().__init__(failure_config)
        self._losses = losses
        self._failures, self._reached = 0, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Decide whether to start the workers again."""
        error, step = training_failed_error, self._losses.last_step()
        if _is_nobodys_fault(error):
            self._losses.tell("restart", f"{reason_of(error)}: starting again from step {step:,}")
            return FailureDecision.RETRY
        if step > self._reached:
            self._failures, self._reached = 0, step
        self._failures += 1
        most = self.failure_config.max_failures
        if self._failures > most:
            return FailureDecision.RAISE
        again = f"starting again from step {step:,}"
        if self._failures > 1:
            again += f", for the {_ordinal(self._failures)} time of at most {most}"
        self._losses.tell("restart", f"{reason_of(error)}: {again}")
        return FailureDecision.RETRY


class ElasticPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as the nodes that stay can hold, with a checkpoint before each change."""

    def __init__(self, scaling_config: ScalingConfig, losses: FailureContext) -> None:
        super().__init__(scaling_config)
        self._losses = losses
        self._told = float("-inf")
        self._wanted: ResizeDecision | None = None
        self._asked, self._saved = 0.0, 0  # when for a checkpoint, and which was the last one then

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start with the workers that there is room for."""
        self._wanted = None
        decision = super().make_decision_for_non_running_worker_group()
        now = time.monotonic()
        if isinstance(decision, NoopDecision) and now - self._told > _TELL_SECONDS:
            self._told = now
            fewest = self.scaling_config.min_workers
            self._losses.tell("waiting", f"waiting for nodes with room for {fewest} workers")
        return decision

    def make_decision_for_running_worker_group(self, *args: Any, **more: Any) -> Any:
        """Resize where nodes came: first ask for a checkpoint, then wait for it."""
        if self._wanted is None:
            decision = super().make_decision_for_running_worker_group(*args, **more)
            if isinstance(decision, ResizeDecision):
                self._wanted = decision
                self._asked, self._saved = time.monotonic(), self._losses.last_step()
                self._losses.board.ask_to_save()
            return NoopDecision()
        self._maybe_send_resource_request()
        late = time.monotonic() - self._asked > _SAVE_SECONDS
        if not late and self._losses.last_step() <= self._saved:
            return NoopDecision()
        wanted, self._wanted = self._wanted, None
        self._losses.tell("resize", f"goes on with {wanted.num_workers} workers")
        return wanted

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """Count what the nodes that are alive and stay can hold; one CPU is Ray Data's.

        The coordinator's word of a node is up to 20 seconds old, and the head's own up to a minute.
        """
        leaving = ray._private.state.state.get_draining_nodes()
        listed = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
            answers = threads.map(answers_still, listed)
        staying = {
            node["NodeID"]: node["Resources"].get("CPU", 0)
            for node, is_there in zip(listed, answers, strict=True)
            if is_there
        }
        count = super()._count_possible_workers(
            {node: has for node, has in reserved_resources.items() if node in staying}
        )
        return int(min(count, sum(staying.values()) - 1))


def answers_still(node: Mapping[str, Any]) -> bool:
    """Whether a node, as `ray.nodes` has it, takes connections.

    A node that is gone stays on Ray's list until some health checks have failed. Workers that are
    given a place there in the meantime, or Ray Data's CPU for them, wait for it in vain.
    """
    try:
        with socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_SECONDS
        ):
            return True
    except OSError:
        return False


class NodesInterface(TorchConfig):  # type: ignore[misc]
    """Makes workers talk over the network interface by which Ray knows their nodes.

    Gloo takes the interface of the host's name, which many systems map to the loopback.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the process group."""
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    use_interface_of(ray.util.get_node_ip_address())


def _is_echo(error: Exception) -> bool:
    """Whether it is what gloo or NCCL say on the other workers when one is lost."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection", "Timed out", "timeout")
    )


def _ordinal(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def _is_nobodys_fault(error: Exception) -> bool:
    """Nodes that go with notice, or don't come yet, say nothing against going on."""
    if isinstance(error, PreemptionError):
        return True
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
    return any(isinstance(cause, Preempted) for cause in causes_of(error))


def causes_of(error: Exception) -> list[Exception]:
    """What the failed workers raised, by rank; what Ray raised, where no worker did."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    if not failures:
        return [getattr(error, "controller_failure", error)]
    return [_innermost(failures[rank]) for rank in sorted(failures)]


def _innermost(failure: Exception) -> Exception:
    """What Ray has wrapped; its own errors have a `cause`, too, which is no exception."""
    for name in ("health_check_failure", "cause"):
        inner = getattr(failure, name, None)
        if isinstance(inner, Exception):
            return _innermost(inner)
    return failure


def reason_of(error: Exception) -> str:
    """Why training was interrupted, in a few words."""
    if isinstance(error, PreemptionError):
        return "a node is taken away"
    causes = causes_of(error)
    cause = next((c for c in causes if not _is_echo(c)), causes[0])
    if isinstance(cause, ray.exceptions.RayActorError):
        return "a worker was lost"
    if isinstance(cause, WorkerHealthCheckTimeoutError) or _is_echo(cause):
        return "a worker does not answer"
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        return "not all workers found a place in time"
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1][:200]
