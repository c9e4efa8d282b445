"""What a run takes of a cluster: its workers' devices, and the CPUs of their data pipelines."""

from __future__ import annotations

import math
from collections.abc import Mapping

from raybert.cluster.session import Resources
from raybert.errors import ConfigError
from raybert.train.settings import TrainConfig


def uses_gpus(config: TrainConfig, gpus: float) -> bool:
    """Whether each worker gets a GPU, in a cluster that has so many."""
    return config.gpu == "yes" or (config.gpu == "auto" and gpus >= config.min_workers)


def operator_cpus(free: int, workers: int, gpu: bool) -> float:
    """The logical CPUs of each worker's masking operators, such that all workers' fit together.

    Every worker drives a Ray Data execution of its own. An operator whose output is not consumed
    keeps its CPU, and a worker whose operator finds none waits for ever, and with it, in the next
    all-reduce, all others. Where CPUs are few, operators share them, on any node. One operator
    masks far more than a CPU trains on; a second one hides a GPU's slow reads. `free` counts the
    cluster's logical CPUs that are not the workers'.
    """
    if free >= workers:
        return min(2 if gpu else 1, free // workers)
    return 1 / math.ceil(workers / max(1, free))


def format_shortage(
    config: TrainConfig, gpu: bool, total: Mapping[str, float], free: Mapping[str, float]
) -> str | None:
    """What a run that has not begun waits for, by what is free; None if there is enough.

    `total` and `free` are the cluster's resources by Ray's names. Before the workers are placed
    they need their devices, and a CPU for Ray Data's operators beside them.
    """
    workers = config.min_workers
    needs = {"CPU": workers + 1, **({"GPU": workers} if gpu else {})}
    missing = [name for name, count in needs.items() if free.get(name, 0.0) < count]
    if not missing:
        return None
    needed = " and ".join(f"{needs[name]} {name}s" for name in missing)
    rest = " and ".join(
        f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}s are free" for name in missing
    )
    return (
        f"waiting for {needed}: {workers} workers need a {'GPU' if gpu else 'CPU'} each, Ray Data "
        f"one CPU, and {rest}; other jobs have the rest: wait for them, or lower "
        f"{config.section}.workers"
    )


def check_resources(config: TrainConfig, gpu: bool, resources: Resources) -> None:
    """Raise ConfigError where a run would wait for ever, unless for an autoscaler's nodes."""
    if not isinstance(config.workers, int) and not resources.started_here:
        return
    workers, name = config.min_workers, f"{config.section}.workers"
    name += "" if isinstance(config.workers, int) else ".min"
    key = f"{name}={workers}"
    if gpu and resources.gpus < workers:
        raise ConfigError(
            f"{key} with {config.section}.gpu={config.gpu} need {workers} GPUs, the cluster has "
            f"{resources.gpus:g}; lower {name} or set {config.section}.gpu=no"
        )
    if resources.cpus < workers + 1:
        raise ConfigError(
            f"{key} leave no CPU for Ray Data's operators: the cluster has "
            f"{resources.cpus:g}; lower it to {max(1, int(resources.cpus) - 1)} or add a node"
        )
