"""Format the estimates of a command's stages as lines."""

from __future__ import annotations

from raybert.errors import RaybertError
from raybert.experiment import Experiment
from raybert.jobs.estimate import Estimate, Machines, estimate, read_or_none
from raybert.terminal.formats import format_count, format_duration, size
from raybert.train.run_folder import RESULT

#: The commands that train, and the stages of each.
TRAINS = {
    "pretrain": ("pretrain",),
    "finetune": ("finetune",),
    "run": ("pretrain", "finetune"),
    "tune": ("tune",),
}


def estimate_lines(experiment: Experiment, command: str, machines: Machines | None) -> list[str]:
    """Estimate the stages that a command trains, as lines; none where it trains nothing."""
    stages = TRAINS.get(command, ())
    reason = _unreachable(experiment) if stages else None
    lines = [] if reason is None else [f"{experiment.run.storage} cannot be read here: {reason}"]
    for stage in stages:
        if reason is None and _is_finished(experiment, stage):
            lines.append(f"{stage}: finished already")
            continue
        if stage == "tune":
            lines.append(f"tune: {_format_search(experiment)}; each of them as configured:")
        estimated = estimate(experiment, stage, machines, reads=reason is None)
        lines += [f"{stage}: {line}" for line in format_estimate(estimated)]
    return lines


def format_estimate(estimated: Estimate) -> list[str]:
    """Format two lines: storage, and computation."""
    stored = "parameters and checkpoints unknown"
    sizes = estimated.size
    if sizes is not None:
        stored = (
            f"{format_count(sizes.parameters)} parameters; at most {sizes.checkpoints} "
            f"checkpoints of {size(sizes.checkpoint)} and a model of {size(sizes.model)}, "
            f"{size(sizes.total)} in all"
        )
    work = [
        *([f"{estimated.steps:,} steps"] if estimated.steps is not None else []),
        *(
            [f"up to {format_count(estimated.tokens)} tokens"]
            if estimated.tokens is not None
            else []
        ),
        *([f"{estimated.flops:.1e} FLOP"] if estimated.flops is not None else []),
    ]
    time = f"time unknown: {estimated.basis}"
    if estimated.seconds is not None:
        devices = "worker" if estimated.gpu is not True else "GPU"
        time = (
            f"about {format_duration(_round(estimated.seconds))} on {estimated.workers} {devices}"
        )
        time += "s" if estimated.workers > 1 else ""
        if estimated.gpu:
            time += f" = {estimated.workers * estimated.seconds / 3600:.1f} GPU-hours"
        time += f" ({estimated.basis})"
    return [stored, ", ".join([*work, time])]


def _format_search(experiment: Experiment) -> str:
    """Format the number of fine-tuning runs of a search."""
    config = experiment.tune
    finals = (config.finalists + 1) * config.seeds
    minutes = f" in {config.minutes:g} minutes" if config.minutes is not None else ""
    trials = "a grid of trials" if config.searcher == "grid" else f"{config.trials} trials"
    return f"{trials}{minutes}, then up to {finals} runs of the finalists"


def _is_finished(experiment: Experiment, stage: str) -> bool:
    return bool(read_or_none(lambda: (experiment.folder / stage).exists(RESULT)))


def _unreachable(experiment: Experiment) -> str | None:
    """Return why this machine cannot read the storage; None where it can."""
    try:
        experiment.folder.exists()
    except RaybertError as error:
        return str(error)
    return None


def _round(seconds: float) -> float:
    """Round an estimate to seconds or, from two minutes on, to minutes."""
    return seconds if seconds < 120 else 60 * round(seconds / 60)
