"""Private parts of Ray Train that any Ray version can import: variables, errors, preemption."""

from __future__ import annotations

import math

from raybert.cluster.internals.private_names import has_private_api

#: Watches for nodes that are about to be taken away; 0 turns it off.
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
#: Fills the dashboard's page of training runs, from one more process that stays on the head.
STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"
#: How long the controller waits for the other workers to leave their process group where one is
#: lost. The controller is an actor: of the driver's variables it gets only those of a list.
PROCESS_GROUP_SHUTDOWN = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10"}


def controller_environment(collective_timeout_s: float, *, is_elastic: bool) -> dict[str, str]:
    """Variables for the controller: how soon it gives up on a worker or on a place for one.

    An unresponsive worker counts as lost after `collective_timeout_s`; Ray's own ten minutes are
    for GPUs that compile. An elastic run, which may start with fewer workers, waits 20 s for a
    place, not 60: a node that has just died stays on Ray's list for some seconds.
    """
    return {
        **({"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"} if is_elastic else {}),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(math.ceil(collective_timeout_s)),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        **PROCESS_GROUP_SHUTDOWN,
    }


def is_preempted() -> bool:
    """Whether Ray has notice, in this worker, that a node of the run will be taken away.

    Unlike `ray.train.get_preemption_info` this is no barrier of all workers.
    """
    if not has_private_api("train"):
        return False
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def is_startup_timeout(error: BaseException | None) -> bool:
    """Whether the workers of a run found no place in time."""
    return _has_class(error, "WorkerGroupStartupTimeoutError")


def is_health_check_timeout(error: BaseException | None) -> bool:
    """Whether a worker did not answer the controller in time."""
    return _has_class(error, "WorkerHealthCheckTimeoutError")


def _has_class(error: BaseException | None, name: str) -> bool:
    # By name, so that a Ray that has renamed its class can still report its errors.
    return any(kind.__name__ == name for kind in type(error).__mro__)
