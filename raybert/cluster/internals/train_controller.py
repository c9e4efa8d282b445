"""Ray Train's controller with our policies; import it only if `has_private_api("train")` is true.

The controller asks a failure policy after each failure and a scaling policy before each start and
while workers run. Ray 2.60 has no public way to choose them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)

__all__ = [
    "FailureDecision",
    "FailurePolicy",
    "NodeScalingPolicy",
    "NoopDecision",
    "PolicyTrainer",
    "ResizeDecision",
]


class PolicyTrainer(TorchTrainer):  # type: ignore[misc]  # of an untyped package
    """TorchTrainer with given policies and without helper actors that a run has no use for.

    Each helper is one more process. The datasets' manager serves datasets given to the trainer;
    here every worker makes its own. The cleaner outlives a killed driver and frees what its run had
    reserved; it is needed only on a Ray that outlives this process.
    """

    def __init__(
        self,
        *args: Any,
        failure_policy: FailurePolicy,
        scaling_policy: ElasticScalingPolicy | None,
        needs_cleaner: bool,
        **options: Any,
    ):
        """Set up the trainer; without a `scaling_policy` its size is fixed."""
        super().__init__(*args, **options)
        self._policies: dict[str, Any] = {"failure_policy": failure_policy}
        if scaling_policy is not None:
            self._policies["scaling_policy"] = scaling_policy
        cleaner = () if needs_cleaner else (PlacementGroupCleanerCallback,)
        self._unused: tuple[type, ...] = (DatasetsCallback, *cleaner)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, self._unused)]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Any:
        return super()._initialize_and_run_controller(**controller_init_kwargs | self._policies)


class NodeScalingPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's elastic policy, counting only the nodes that `usable_cpus` names."""

    @abstractmethod
    def usable_cpus(self) -> dict[str, float]:
        """The CPUs of the nodes that workers may be placed on, by node id."""

    @abstractmethod
    def on_count(self, workers: int) -> None:
        """Called with the number of workers that there is room for, whenever it is counted."""

    def keep_requesting(self) -> None:
        """Renew the run's request to the autoscaler, which expires otherwise."""
        self._maybe_send_resource_request()

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """Count the workers that the usable nodes can hold; one CPU is left for Ray Data."""
        cpus = self.usable_cpus()
        count = super()._count_possible_workers(
            {node: has for node, has in reserved_resources.items() if node in cpus}
        )
        workers = int(min(count, sum(cpus.values()) - 1))
        self.on_count(workers)
        return workers
