"""The private parts of Ray that raybert uses, and the check that the installed Ray has them."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raybert.errors import RaybertError

TESTED = "2.60"  # the Ray versions that the hooks were tested with: the pin in pyproject.toml

Group = Literal["kv", "session", "data", "train", "hyperband", "asha", "serve", "haproxy"]


@dataclass(frozen=True)
class Hook:
    """A private name of Ray's."""

    path: str  # module:name or module:Class.name
    reason: str  # why it is needed, and the public way where one is expected
    parameters: tuple[str, ...] | None = None  # of a function, as we call or override it

    def is_present(self) -> bool:
        """Whether the installed Ray has it, with these parameters."""
        module, _, names = self.path.partition(":")
        try:
            found: Any = importlib.import_module(module)
        except ImportError:
            return False
        for name in names.split("."):
            if not hasattr(found, name):
                return _is_set_by_init(found, name)
            found = getattr(found, name)
        if self.parameters is None:
            return True
        return callable(found) and self.parameters == tuple(inspect.signature(found).parameters)


def _is_set_by_init(kind: Any, name: str) -> bool:
    """Whether instances of a class have an attribute that the class itself lacks."""
    if name in getattr(kind, "__dataclass_fields__", ()):
        return True
    return isinstance(kind, type) and name in kind.__init__.__code__.co_names  # type: ignore[misc]


_KV = "ray.experimental.internal_kv:_internal_kv_"
_TRAINER = "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer."
_TRAIN = "ray.train.v2._internal."
_ELASTIC = f"{_TRAIN}execution.scaling_policy:ElasticScalingPolicy."
_HYPERBAND = "ray.tune.schedulers.hyperband:"

#: All hooks, by the feature that needs them.
HOOKS: dict[Group, tuple[Hook, ...]] = {
    "kv": (
        Hook(
            f"{_KV}put",
            "the channel between driver and workers; the public way is an actor, which is one more "
            "process that wakes a hundred times a second and is lost with its node",
            ("key", "value", "overwrite", "namespace"),
        ),
        Hook(f"{_KV}get", "reads the channel", ("key", "namespace")),
        Hook(f"{_KV}list", "lists the channel's records", ("prefix", "namespace")),
        Hook(f"{_KV}del", "clears the channel", ("key", "del_by_prefix", "namespace")),
    ),
    "session": (
        Hook(
            "ray._raylet:Config.initialize",
            "Ray reads RAY_AUTH_MODE once, when it is imported; this makes it read again",
            ("config_list",),
        ),
        Hook(
            "ray._private.worker:print_to_stdstream",
            "prints Ray's node events on the driver even with log_to_driver=False",
            ("data", "ignore_prefix"),
        ),
        Hook("ray._private.worker:_global_node", "the node that ray.init started in this process"),
        Hook(
            "ray._private.node:Node.kill_log_monitor",
            "ends a process whose output nobody reads; ray.init has no option for it",
            ("self", "check_alive"),
        ),
    ),
    "data": (
        Hook(
            "ray.data._internal.execution.execution_callback:ExecutionCallback.on_execution_step",
            "lets the control loop sleep between steps",
            ("self", "executor"),
        ),
        Hook(
            "ray.data:DataContext.custom_execution_callback_classes",
            "registers that callback; public, but undocumented",
        ),
    ),
    "train": (
        Hook(
            f"{_TRAINER}_initialize_and_run_controller",
            "passes our policies to the controller; no public option takes a policy",
            ("self", "controller_init_kwargs"),
        ),
        Hook(
            f"{_TRAINER}_create_default_callbacks",
            "leaves out the callbacks that start helper actors",
            ("self",),
        ),
        Hook(f"{_TRAIN}callbacks:DatasetsCallback", "starts an actor for datasets we do not pass"),
        Hook(
            f"{_TRAIN}callbacks.placement_group_callback:PlacementGroupCleanerCallback",
            "starts an actor that outlives the driver and fails without Ray's dashboard",
        ),
        Hook(
            f"{_TRAIN}execution.failure_handling:FailurePolicy.make_decision",
            "decides about a restart; FailureConfig only counts all failures of a run",
            ("self", "training_failed_error"),
        ),
        Hook(f"{_TRAIN}execution.failure_handling:FailureDecision.RETRY", "the decision"),
        Hook(f"{_TRAIN}execution.failure_handling:FailureDecision.RAISE", "the decision"),
        Hook(
            f"{_ELASTIC}make_decision_for_running_worker_group",
            "saves a checkpoint before a resize",
            ("self", "worker_group_state", "worker_group_status"),
        ),
        Hook(
            f"{_ELASTIC}make_decision_for_non_running_worker_group",
            "reports that a run waits for nodes",
            ("self",),
        ),
        Hook(
            f"{_ELASTIC}_count_possible_workers",
            "leaves out nodes that are gone or draining, and one CPU for Ray Data",
            ("self", "reserved_resources"),
        ),
        Hook(
            f"{_ELASTIC}_maybe_send_resource_request",
            "keeps the autoscaler's request alive while a checkpoint is awaited",
            ("self",),
        ),
        Hook(f"{_TRAIN}execution.scaling_policy:NoopDecision", "the decision"),
        Hook(f"{_TRAIN}execution.scaling_policy:ResizeDecision.num_workers", "the decision"),
        Hook(
            "ray._private.state:GlobalState.get_draining_nodes",
            "the nodes that will go; ray.nodes() lists them as alive",
            ("self",),
        ),
        Hook(
            f"{_TRAIN}execution.context:get_train_context",
            "reads preemption without a barrier; ray.train.get_preemption_info is one",
            (),
        ),
        Hook(f"{_TRAIN}execution.context:TrainContext.preemption_context", "holds its notice"),
        Hook(
            f"{_TRAIN}execution.preemption:PreemptionContext.preemption_info", "the notice itself"
        ),
        Hook(
            f"{_TRAIN}exceptions:WorkerGroupStartupTimeoutError",
            "tells a wait for nodes from a failure",
        ),
        Hook(
            f"{_TRAIN}exceptions:WorkerHealthCheckTimeoutError",
            "tells a silent worker from a failure",
        ),
    ),
    "hyperband": (
        Hook(
            f"{_HYPERBAND}HyperBandScheduler._process_bracket",
            "ends a round whose last trial finished in an earlier session; Tune restores a "
            "scheduler only from its own pickles",
            ("self", "tune_controller", "bracket"),
        ),
        Hook(f"{_HYPERBAND}HyperBandScheduler._trial_info", "the bracket of each trial"),
        Hook(f"{_HYPERBAND}HyperBandScheduler._state", "the bracket that is being filled"),
        Hook(f"{_HYPERBAND}HyperBandScheduler._metric", "the key of a result's score"),
        Hook(f"{_HYPERBAND}HyperBandScheduler._time_attr", "the key of a result's time"),
        Hook(f"{_HYPERBAND}_Bracket._live_trials", "the trials of a bracket, and their results"),
        Hook(f"{_HYPERBAND}_Bracket._all_trials", "the trials that were ever in it"),
        Hook(f"{_HYPERBAND}_Bracket._n", "how many trials it holds in this round"),
        Hook(f"{_HYPERBAND}_Bracket._n0", "how many it held in the first"),
        Hook(f"{_HYPERBAND}_Bracket.trials_to_unpause", "the paused trials that may continue"),
        Hook(f"{_HYPERBAND}_Bracket.cur_iter_done", "whether a round has ended", ("self",)),
        Hook(f"{_HYPERBAND}_Bracket.cleanup_trial", "takes a trial out", ("self", "trial")),
    ),
    "asha": (
        Hook(
            "ray.tune.schedulers.async_hyperband:AsyncHyperBandScheduler._brackets",
            "the bracket that earlier sessions' results are added to",
        ),
        Hook(
            "ray.tune.schedulers.async_hyperband:_Bracket.on_result",
            "adds a result",
            ("self", "trial", "cur_iter", "cur_rew"),
        ),
    ),
    "serve": (
        Hook(
            "ray.serve.context:_get_global_client",
            "the address that a running Serve listens on; serve.status() lacks it",
            ("raise_if_no_controller_running",),
        ),
    ),
    "haproxy": (
        Hook(
            "ray.serve._private.haproxy_templates:HAPROXY_CONFIG_TEMPLATE",
            "checked before Serve starts: it binds internal pages to all interfaces, and no option "
            "changes that",
        ),
    ),
}

#: What a Ray without a group's hooks does; for those that are not listed nothing replaces them.
FALLBACKS: dict[Group, str] = {
    "session": "Ray prints more, and idle processes keep running",
    "data": "Ray Data's control loop takes processor time from the training",
    "train": "Ray Train's own failure and scaling policies are used",
    "hyperband": "Ray Tune's HyperBand is used, which does not know earlier sessions' trials",
    "asha": "ASHA does not know earlier sessions' trials",
}


@functools.cache
def check(group: Group) -> bool:
    """Whether the installed Ray has a group of hooks; logs a warning once where it has not.

    Raises:
        RaybertError: nothing replaces the missing hooks.
    """
    missing = find_missing(HOOKS[group])
    if not missing:
        return True
    import ray

    found = f"Ray {ray.__version__} lacks {', '.join(hook.path for hook in missing)}"
    advice = f"install ray=={TESTED}.*"
    if group not in FALLBACKS:
        raise RaybertError(f"{found}; {advice}")
    logging.getLogger(__name__).warning("%s: %s; %s", found, FALLBACKS[group], advice)
    return False


def find_missing(hooks: Sequence[Hook]) -> list[Hook]:
    """The hooks that the installed Ray lacks, or has with other parameters."""
    return [hook for hook in hooks if not hook.is_present()]
