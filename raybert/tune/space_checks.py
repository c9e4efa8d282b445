"""Read the search space of a configuration and reject what can't work, before any trial starts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from raybert.errors import ConfigError
from raybert.tasks.protocol import TextTask
from raybert.train.settings import LIMITS
from raybert.tune.schedulers import SCHEDULERS
from raybert.tune.settings import DEFAULT_SPACE, TrialConfig, TuneConfig
from raybert.tune.space import Dimension, Space

_DRAWS = 30  # of the other keys, if a value is invalid beside the configured ones
_COMPARED = "trials are compared on it, so it must be the same for all"
#: Keys and sections that can't be searched, and why.
_FIXED = {
    "finetune.seed": "a seed is no setting to choose; tune.seeds runs the finalists with several",
    "finetune.minutes": "trials that share a machine would each run another number of steps; "
    "search over finetune.epochs",
    "finetune.initialize_from": "all trials start from one model; run one search for each model",
    "finetune.source": _COMPARED,
    "finetune.validation": _COMPARED,
    "finetune.validation_fraction": _COMPARED,
    "finetune.validation_split": _COMPARED,
    "finetune.metric": _COMPARED,
    "finetune.task": _COMPARED,
    "finetune.evaluations": "trials are compared at their evaluations, which must be the same "
    "for all",
    "finetune.distill": "the teacher's predictions are computed once, before the trials",
    **dict.fromkeys(
        (f"finetune.{key}" for key in ("workers", "gpu", "threads", "digests", "deterministic")),
        "it does not change what is learned; set it for all trials",
    ),
}


def task_space(space: Mapping[str, Any], task: type[TextTask]) -> dict[str, Any]:
    """The configured space for a task.

    Ranges that are the defaults are the task's own, and left out where it does not use the key.

    Raises:
        ConfigError: the space names a range of a key that has no effect on the task.
    """
    found: dict[str, Any] = {}
    for key, value in space.items():
        is_default = value == DEFAULT_SPACE.get(key)
        if key in task.unused_settings:
            if not is_default and value is not None:
                raise ConfigError(
                    f"tune.space: {key} has no effect on {task.name}; leave it out, or set "
                    "finetune.task"
                )
        else:
            found[key] = task.search_space.get(key, value) if is_default else value
    if DEFAULT_SPACE.keys() <= space.keys():
        found |= {key: value for key, value in task.search_space.items() if key not in space}
    return found


def read_space(config: TuneConfig, base: TrialConfig, task: type[TextTask] | None = None) -> Space:
    """Parse the search space, for a task where it is known.

    Raises:
        ConfigError: a space, start or scheduler can't work.
    """
    space = Space.parse(config.space if task is None else task_space(config.space, task))
    if not len(space):
        raise ConfigError("tune.space is empty; name keys and their ranges, or leave it out")
    for dimension in space.dimensions:
        _check_key(dimension.key, base, "tune.space")
        _check_ends(dimension, space, base)
    for values in config.start:
        for key in values:
            if "." not in key:
                raise ConfigError(
                    f"tune.start: {key}: write keys with their section, on one line: "
                    "finetune.lr: 1e-3"
                )
            _check_key(key, base, "tune.start")
        base.with_values(values, "tune.start")
    if base.finetune.minutes is not None:
        raise ConfigError(
            f"finetune.minutes={base.finetune.minutes:g}: {_FIXED['finetune.minutes']} or set "
            "finetune.minutes=null and finetune.epochs"
        )
    SCHEDULERS[config.scheduler.kind](config.scheduler).check_space(space)
    return space


def has_unequal_rungs(config: TuneConfig, space: Space, base: TrialConfig) -> bool:
    """Whether the scheduler would compare trials that were trained for unequal epochs.

    finetune.evaluations spreads a number of evaluations over each trial's own length, so that the
    first evaluation past a rung comes at another epoch for every length.
    """
    lengths = {f"finetune.{name}" for name in LIMITS} & {d.key for d in space.dimensions}
    return (
        SCHEDULERS[config.scheduler.kind].has_rungs
        and bool(lengths)
        and base.finetune.evaluations is not None
    )


def longest_epochs(
    space: Space, base: TrialConfig, steps_per_epoch: int, tokens_per_epoch: int
) -> float:
    """The epochs of the longest trial that the space allows."""
    ends = {d.key.removeprefix("finetune."): d.ends for d in space.dimensions}
    config = base.finetune
    if "epochs" in ends:
        return float(max(ends["epochs"]))
    if "steps" in ends:
        return float(max(ends["steps"])) / steps_per_epoch
    steps = config.limit_in_steps(steps_per_epoch, tokens_per_epoch) or steps_per_epoch
    return steps / steps_per_epoch


def _check_key(key: str, base: TrialConfig, where: str) -> None:
    for name, why in _FIXED.items():
        if key == name or key.startswith(f"{name}."):
            raise ConfigError(f"{where}: {key} can't be searched: {why}")
    section = key.partition(".")[0]
    if section == "model" and base.finetune.initialize_from != "scratch":
        raise ConfigError(
            f"{where}: {key}: the model's shape is that of the pretrained model; search over it "
            "with finetune.initialize_from=scratch"
        )
    if section not in ("model", "finetune"):
        raise ConfigError(
            f"{where}: {key}: trials are fine-tuning runs, which read the sections finetune and "
            "model only"
        )


def _check_ends(dimension: Dimension, space: Space, base: TrialConfig) -> None:
    """Check both ends of a range, or each choice: alone, or beside random draws of other keys."""
    for value in dimension.ends:
        try:
            base.with_values({dimension.key: value})
        except ConfigError as error:
            draws = random.Random(0)
            for _ in range(_DRAWS):
                if base.accepts({**space.draw(draws), dimension.key: value}):
                    break
            else:
                raise error from None
