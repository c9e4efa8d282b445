"""How many trials run at a time, and the resources of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raybert.cluster.session import Resources
from raybert.errors import ConfigError
from raybert.train.settings import TrainConfig
from raybert.tune.settings import TuneConfig

_SPARE_CPUS = 2  # logical CPUs that a Ray started here has for Ray Data; trials do not use it


@dataclass(frozen=True)
class TrialResources:
    """How many trials run at a time, and the resources of each trial's process."""

    trials: int
    cpus: float  # 0, like `gpus`, if a trial's workers are separate processes
    gpus: float

    @property
    def request(self) -> dict[str, float]:
        """The resources that Ray Tune requests for a trial's process.

        Ray Tune rejects an empty request, and a small fraction of a CPU would leave the node
        without its last complete one, which a worker of Ray Train may wait for: so it is one byte
        of memory.
        """
        needed = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: count for name, count in needed.items() if count} or {"memory": 1}


def trial_resources(
    config: TuneConfig, training: TrainConfig, gpu: bool, resources: Resources
) -> TrialResources:
    """Divide the cluster among trials; a ConfigError if none fits: it would wait forever."""
    if training.max_workers > 1:
        found, requested = _for_several_workers(training, gpu, resources)
    else:
        found, requested = _for_one_worker(config, gpu, resources)
    if found.trials < 1:
        spare = _SPARE_CPUS if resources.started_here else 0
        cpus, gpus = max(_nodes(resources), key=lambda node: (node[1], node[0]))
        raise ConfigError(
            f"{requested}: the cluster has {resources.cpus - spare:g} CPUs and "
            f"{resources.gpus:g} GPUs for trials, {cpus - spare:g} and {gpus:g} on its largest "
            "node; lower that, or add nodes"
        )
    return replace(found, trials=min(found.trials, config.concurrency or found.trials))


def _for_one_worker(
    config: TuneConfig, gpu: bool, resources: Resources
) -> tuple[TrialResources, str]:
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
    gpus = float(gpu) if gpus is None else gpus
    requested = f"tune.cpus_per_trial={cpus:g}"
    spare = _SPARE_CPUS if resources.started_here else 0
    fits = 0
    for node_cpus, node_gpus in _nodes(resources):
        counts = [(node_cpus - spare) // cpus]
        if gpus:
            counts.append(node_gpus // gpus)
        fits += max(0, int(min(counts)))
    if gpus:
        requested += f" and tune.gpus_per_trial={gpus:g}"
    return TrialResources(fits, cpus, gpus), requested


def _for_several_workers(
    training: TrainConfig, gpu: bool, resources: Resources
) -> tuple[TrialResources, str]:
    """Resources of trials whose workers Ray Train starts; one CPU stays free for Ray Data."""
    nodes = _nodes(resources)
    fits = sum(int(cpus) for cpus, _ in nodes) - 1
    if gpu:
        fits = min(fits, sum(int(min(cpus, gpus)) for cpus, gpus in nodes))
    trials = fits // training.max_workers
    if not trials and fits >= training.min_workers:  # elastic: uses as many workers as fit
        trials = 1
    return TrialResources(trials, 0.0, 0.0), f"finetune.workers={training.min_workers}"


def _nodes(resources: Resources) -> Sequence[tuple[float, float]]:
    return resources.nodes or [(resources.cpus, resources.gpus)]
