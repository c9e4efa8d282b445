"""What a stage's steps take on GPUs that a user names, from a configuration alone."""

from __future__ import annotations

from typing import Any

from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.jobs.estimate import (
    GPU_SHARE,
    estimate,
    estimate_storage,
    format_estimate,
    seq_len_of,
    shape_of,
    training_of,
)
from raybert.jobs.step_time import REMEDIES, Machines, Work, best_interval, step_time
from raybert.model.cost import flops_per_token
from raybert.tasks.settings import PretrainConfig
from raybert.terminal.formats import format_count, format_duration
from raybert.train.peaks import PEAK_FLOPS, gpu_peak_flops


def estimate_on(
    experiment: Experiment,
    stage: str,
    gpus: int,
    gpus_per_node: int,
    gpu: str,
    network_gbit: float,
) -> dict[str, Any]:
    """A stage with a worker on each GPU: storage, a step, the run, and what limits it, in `lines`.

    UserError for an unknown type of GPU, and for a model that can't be read here.
    """
    if stage not in ("pretrain", "finetune"):
        raise UserError(f"{stage} is not one stage of training; choose pretrain or finetune")
    machines = machines_of(gpus, gpus_per_node, gpu, network_gbit)
    work = work_of(experiment, stage)
    if work is None:
        raise UserError(f"the model of {stage} is not known yet; make the corpus first")
    changed = training_of(experiment, stage).model_copy(update={"workers": gpus, "gpu": "yes"})
    experiment = experiment.model_copy(update={stage: changed})
    estimated = estimate(experiment, stage, {})
    found = scaling_of(work, machines)
    lines = [format_estimate(estimated)[0], *scaling_lines(found)]
    if estimated.steps is not None:
        useful = max(1e-9, 1 - found["saving"] - found["failing"])
        found["run_seconds"] = estimated.steps * found["seconds"] / useful
        lines.append(
            f"{estimated.steps:,} steps take about {format_duration(found['run_seconds'])} = "
            f"{gpus * found['run_seconds'] / 3600:,.1f} GPU-hours, evaluations not counted"
        )
    return {"lines": lines, **found}


def machines_of(gpus: int, gpus_per_node: int, gpu: str, network_gbit: float) -> Machines:
    """Nodes of a type of GPU, each with a network of `network_gbit` Gb/s; UserError if unknown."""
    peak = gpu_peak_flops(gpu)
    if not peak:
        raise UserError(
            f"--gpu {gpu}: its peak is unknown; choose one of {', '.join(sorted(PEAK_FLOPS))}"
        )
    return Machines(
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        flops=GPU_SHARE * peak,
        node_bandwidth=_node_bandwidth(gpu),
        network_bandwidth=0.9 * network_gbit * 1e9 / 8,
    )


def _node_bandwidth(gpu: str) -> float:
    """Bytes a second of an all-reduce within a node: docs/scaling.md has the sources."""
    words = gpu.upper().split()
    if "PCIE" in words or "NVL" in words or not gpu.upper().startswith(("H", "A100", "B", "G")):
        return 20e9  # over PCIe; without a switch of NVLinks a ring crosses it
    return {"A100": 235e9, "B": 900e9, "G": 900e9}.get(
        "A100" if "A100" in words else gpu[0].upper(), 450e9
    )


def work_of(experiment: Experiment, stage: str) -> Work | None:
    """A step of a stage as it is configured; None where its model can't be read here."""
    config, shape = training_of(experiment, stage), shape_of(experiment, stage)
    sizes = estimate_storage(experiment, stage, shape)
    if shape is None or sizes is None:
        return None
    seq_len = seq_len_of(experiment, stage)
    head = (shape[1], config.masking.mask_rate) if isinstance(config, PretrainConfig) else ()
    tokens = config.global_batch_size * seq_len
    minutes = config.checkpoint_minutes
    return Work(
        flops=tokens * flops_per_token(shape[0], seq_len, *head),
        tokens=tokens,
        parameters=sizes.parameters,
        micro_batches=config.micro_batches_per_step,
        gradient_bytes=2 if config.gradients == "bf16" else 4,
        bucket_bytes=1e6 * config.bucket_mb,
        sharding=config.shards,
        recomputes=config.activation_checkpointing,
        checkpoint_seconds=None if minutes is None else 60 * minutes,
    )


def scaling_of(work: Work, machines: Machines) -> dict[str, Any]:
    """A step's seconds by their cause, and what limits them."""
    found = step_time(work, machines)
    return {
        **found._asdict(),
        "seconds": found.seconds,
        "tokens_per_second": work.tokens / found.seconds,
        "efficiency": found.efficiency,
        "limit": found.limit,
        "gpus": machines.gpus,
        "nodes": machines.nodes,
        "micro_batches": work.micro_batches,
        "seconds_between_failures": machines.seconds_between_failures,
        "best_checkpoint_seconds": best_interval(work, machines),
    }


def scaling_lines(found: dict[str, Any]) -> list[str]:
    """Lines of `scaling_of`: the step, what costs most, and failures."""
    gpus, nodes = found["gpus"], found["nodes"]
    parts = [f"{found['compute']:.3f} s of computing"]
    parts += [
        f"{found[key]:.3f} of {name}"
        for key, name in (("exposed", "sums that nothing hides"), ("fixed", "fixed cost"))
        if found[key] >= 0.0005
    ]
    where = f"{gpus} GPUs in {nodes} node{'s' if nodes > 1 else ''}" if gpus > 1 else "1 GPU"
    lines = [
        f"a step takes about {found['seconds']:.3f} s on {where} ({' + '.join(parts)}; the input "
        f"needs {found['input']:.3f}): {format_count(found['tokens_per_second'])} tokens/s, "
        f"{found['efficiency']:.0%} of the time is computing",
        f"what costs most: {REMEDIES[found['limit']]}",
    ]
    if gpus > found["micro_batches"]:
        lines.append(
            f"{gpus - found['micro_batches']} GPUs have nothing to do: a step has "
            f"{found['micro_batches']} micro-batches"
        )
    lines.append(
        f"a failure every {format_duration(found['seconds_between_failures'])}: failures cost "
        f"{found['failing']:.2%}, copies of checkpoints {found['saving']:.2%}; together least with "
        f"one every {format_duration(found['best_checkpoint_seconds'])}"
    )
    return lines
