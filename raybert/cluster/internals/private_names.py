"""The private names of Ray that raybert uses, and the check that the installed Ray has them."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Sequence
from typing import Any, Literal

from raybert.errors import RaybertError

TESTED = "2.60"  # the Ray versions that the names were tested with: the pin in pyproject.toml

Group = Literal["kv", "session", "data", "train", "hyperband", "asha", "serve", "haproxy"]

_KV = "ray.experimental.internal_kv:_internal_kv_"
_TRAINER = "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer."
_TRAIN = "ray.train.v2._internal."
_FAILURE = f"{_TRAIN}execution.failure_handling:Failure"
_SCALING = f"{_TRAIN}execution.scaling_policy:"
_ELASTIC = f"{_SCALING}ElasticScalingPolicy."
_HYPERBAND = "ray.tune.schedulers.hyperband:HyperBandScheduler."
_BRACKET = "ray.tune.schedulers.hyperband:_Bracket."
_ASHA = "ray.tune.schedulers.async_hyperband:"

#: The names by the feature that needs them, as module:name or module:Class.name; functions have the
#: parameters with which we call or override them. The comments give the reasons.
PRIVATE_NAMES: dict[Group, tuple[str, ...]] = {
    # The channel between driver and workers. The public way is an actor: one more process, which
    # wakes a hundred times a second and is lost with its node.
    "kv": (
        f"{_KV}put(key, value, overwrite, namespace)",
        f"{_KV}get(key, namespace)",
        f"{_KV}list(prefix, namespace)",
        f"{_KV}del(key, del_by_prefix, namespace)",
    ),
    "session": (
        "ray._raylet:Config.initialize(config_list)",  # reads RAY_AUTH_MODE again
        # Prints Ray's node events on the driver even with log_to_driver=False.
        "ray._private.worker:print_to_stdstream(data, ignore_prefix)",
        "ray._private.worker:_global_node",  # the node that ray.init started in this process
        # Ends a process whose output nobody reads; ray.init has no option for it.
        "ray._private.node:Node.kill_log_monitor(self, check_alive)",
    ),
    "data": (  # lets the control loop sleep between steps
        "ray.data._internal.execution.execution_callback:"
        "ExecutionCallback.on_execution_step(self, executor)",
        "ray.data:DataContext.custom_execution_callback_classes",  # public, but undocumented
    ),
    "train": (
        # Passes our policies to the controller; no public option takes a policy.
        f"{_TRAINER}_initialize_and_run_controller(self, controller_init_kwargs)",
        f"{_TRAINER}_create_default_callbacks(self)",  # leaves out two that start helper actors:
        f"{_TRAIN}callbacks:DatasetsCallback",  # for datasets, which we do not pass
        # Outlives the driver, and fails without Ray's dashboard.
        f"{_TRAIN}callbacks.placement_group_callback:PlacementGroupCleanerCallback",
        # Decides about a restart; FailureConfig only counts all failures of a run.
        f"{_FAILURE}Policy.make_decision(self, training_failed_error)",
        f"{_FAILURE}Decision.RETRY",  # what it returns
        f"{_FAILURE}Decision.RAISE",
        # Saves a checkpoint before a resize.
        f"{_ELASTIC}make_decision_for_running_worker_group"
        "(self, worker_group_state, worker_group_status)",
        # Reports that a run waits for nodes.
        f"{_ELASTIC}make_decision_for_non_running_worker_group(self)",
        # Leaves out nodes that are gone or draining, and one CPU for Ray Data.
        f"{_ELASTIC}_count_possible_workers(self, reserved_resources)",
        # Keeps the autoscaler's request alive while a checkpoint is awaited.
        f"{_ELASTIC}_maybe_send_resource_request(self)",
        f"{_SCALING}NoopDecision",  # what these return
        f"{_SCALING}ResizeDecision.num_workers",
        # The nodes that will go; ray.nodes() lists them as alive.
        "ray._private.state:GlobalState.get_draining_nodes(self)",
        # Reads the notice of preemption; ray.train.get_preemption_info is a barrier.
        f"{_TRAIN}execution.context:get_train_context()",
        f"{_TRAIN}execution.context:TrainContext.preemption_context",
        f"{_TRAIN}execution.preemption:PreemptionContext.preemption_info",
        # Distinguish a wait for nodes and an unresponsive worker from a failure.
        f"{_TRAIN}exceptions:WorkerGroupStartupTimeoutError",
        f"{_TRAIN}exceptions:WorkerHealthCheckTimeoutError",
    ),
    # Tune restores a scheduler only from its own pickles, not from an earlier session's results.
    "hyperband": (
        f"{_HYPERBAND}_process_bracket(self, tune_controller, bracket)",  # ends a round
        f"{_HYPERBAND}_trial_info",  # the bracket of each trial
        f"{_HYPERBAND}_state",  # the bracket that is being filled
        f"{_HYPERBAND}_metric",  # the key of a result's score
        f"{_HYPERBAND}_time_attr",  # the key of a result's time
        f"{_BRACKET}_live_trials",  # the trials of a bracket, and their results
        f"{_BRACKET}_all_trials",  # the trials that were ever in it
        f"{_BRACKET}_n",  # how many trials it holds in this round
        f"{_BRACKET}_n0",  # how many it held in the first
        f"{_BRACKET}trials_to_unpause",  # the paused trials that may continue
        f"{_BRACKET}cur_iter_done(self)",  # whether a round has ended
        f"{_BRACKET}cleanup_trial(self, trial)",  # takes a trial out
    ),
    "asha": (
        f"{_ASHA}AsyncHyperBandScheduler._brackets",  # where earlier sessions' results go
        f"{_ASHA}_Bracket.on_result(self, trial, cur_iter, cur_rew)",  # adds a result
    ),
    # The address that a running Serve listens on; serve.status() lacks it.
    "serve": ("ray.serve.context:_get_global_client(raise_if_no_controller_running)",),
    # Checked before Serve starts: it binds internal pages to all interfaces, whatever the options.
    "haproxy": ("ray.serve._private.haproxy_templates:HAPROXY_CONFIG_TEMPLATE",),
}

#: What happens with a Ray that lacks a group's names; without those that are not listed raybert
#: fails.
FALLBACKS: dict[Group, str] = {
    "session": "Ray prints more, and idle processes keep running",
    "data": "Ray Data's control loop takes processor time from the training",
    "train": "Ray Train's own failure and scaling policies are used",
    "hyperband": "Ray Tune's HyperBand is used, which does not know earlier sessions' trials",
    "asha": "ASHA does not know earlier sessions' trials",
}


@functools.cache
def has_private_api(group: Group) -> bool:
    """Whether the installed Ray has all names of a group; if not, a warning is logged once.

    RaybertError is raised if the group has no fallback.
    """
    missing = find_missing(PRIVATE_NAMES[group])
    if not missing:
        return True
    import ray

    paths = ", ".join(name.partition("(")[0] for name in missing)
    found, advice = f"Ray {ray.__version__} lacks {paths}", f"install ray=={TESTED}.*"
    if group not in FALLBACKS:
        raise RaybertError(f"{found}; {advice}")
    logging.getLogger(__name__).warning("%s: %s; %s", found, FALLBACKS[group], advice)
    return False


def find_missing(names: Sequence[str]) -> list[str]:
    """The names that the installed Ray lacks, or has with other parameters."""
    return [name for name in names if not is_present(name)]


def is_present(name: str) -> bool:
    """Whether the installed Ray has a name, written as in PRIVATE_NAMES."""
    path, is_function, parameters = name.rstrip(")").partition("(")
    module, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            return _is_set_by_init(found, attribute)
        found = getattr(found, attribute)
    if not is_function:
        return True
    return callable(found) and ", ".join(inspect.signature(found).parameters) == parameters


def _is_set_by_init(kind: Any, name: str) -> bool:
    """Whether instances of a class have an attribute that the class itself lacks."""
    if name in getattr(kind, "__dataclass_fields__", ()):
        return True
    return isinstance(kind, type) and name in kind.__init__.__code__.co_names  # type: ignore[misc]
