"""How a search is configured, and which keys it may search over."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from raybert.config import Settings, build, flatten
from raybert.errors import ConfigError
from raybert.model.settings import ModelConfig
from raybert.tasks.classification import FinetuneConfig
from raybert.train.settings import ALIKE_MAY_CHANGE, LIMITS
from raybert.tune.space import Dimension, Space, Values

#: What is worth searching: the first lines decide most, the last ones cost time in every step.
DEFAULT_SPACE: dict[str, Any] = {
    "finetune.lr": {"log_uniform": [1e-4, 3e-3]},
    "finetune.epochs": {"integer": [2, 5]},
    "finetune.global_batch_size": {"choice": [16, 32, 64]},
    "finetune.layer_decay": {"uniform": [0.6, 1.0]},
    "finetune.warmup_fraction": {"uniform": [0.0, 0.2]},
    "finetune.weight_decay": {"log_uniform": [1e-3, 0.3]},
    "finetune.dropout": {"uniform": [0.0, 0.4]},
    "finetune.head.dropout": {"uniform": [0.0, 0.5]},
    "finetune.head.pooling": {"choice": ["cls", "mean"]},
    "finetune.label_smoothing": {"choice": [0.0, 0.05, 0.1]},
    "finetune.head_share": {"uniform": [0.1, 1.0]},
    "finetune.frozen_epochs": {"choice": [0, 0.5]},
    "finetune.average_decay": {"choice": [0.0, 0.99]},
    "finetune.r_drop": {"choice": [0.0, 1.0]},
    "finetune.adversarial": {"choice": [0.0, 1.0]},
    "finetune.adversarial_size": {
        "log_uniform": [0.01, 0.1],
        "when": {"finetune.adversarial": 1.0},
    },
}

#: What may change while a trial runs, as population-based training changes it.
MUTABLE = frozenset(
    f"finetune.{key}"
    for key in (
        *("lr", "weight_decay", "layer_decay", "max_grad_norm", "label_smoothing"),
        *("dropout", "head.dropout", "r_drop", "adversarial", "adversarial_size"),
    )
)

_TRIES = 30  # draws of the other keys, where a value is refused beside the configured ones
_COMPARED = "it decides what trials are compared on, and must be the same for all"
#: Keys, and sections, that can't be searched, and why.
_FIXED = {
    "finetune.seed": "a seed is no setting to choose; tune.seeds runs the best few with several",
    "finetune.minutes": "trials that share a machine would each get another number of steps; "
    "search over finetune.epochs",
    "finetune.initialize_from": "all trials start from one model; search once for each",
    "finetune.source": _COMPARED,
    "finetune.validation": _COMPARED,
    "finetune.validation_fraction": _COMPARED,
    "finetune.evaluations": "trials are compared where they are evaluated, which must be the same "
    "for all",
    "finetune.distill": "a teacher's answers are made once, before the trials",
    **dict.fromkeys(
        (f"finetune.{key}" for key in ("workers", "gpu", "threads", "digests", "deterministic")),
        "it does not change what is learned; set it for all trials",
    ),
}


class SchedulerConfig(Settings):
    """Which trials go on."""

    kind: Literal["none", "asha", "hyperband", "pbt"] = Field(
        "asha",
        description="none: all of them; asha: the better part at each rung (arXiv 1810.05934); "
        "hyperband: the same in brackets (arXiv 1603.06560); pbt: the worst take over weights and "
        "settings of the best (arXiv 1711.09846)",
    )
    grace_epochs: float = Field(
        1.0, gt=0, description="asha: epochs of the first rung; no trial is stopped before it"
    )
    reduction: float = Field(
        3.0, gt=1, description="asha, hyperband: one of so many goes on, to a rung so much higher"
    )
    interval_epochs: float = Field(1.0, gt=0, description="pbt: epochs between two exchanges")
    quantile: float = Field(
        0.25, gt=0, le=0.5, description="pbt: the share that gives, and the share that takes"
    )


class TuneConfig(Settings):
    """A search for the best fine-tuning."""

    space: dict[str, Any] = Field(
        DEFAULT_SPACE,
        description="dotted keys, each with uniform, log_uniform, integer, log_integer (two "
        "numbers) or choice (a list); `when: {other.key: value}` makes it matter only then, "
        "`points` is a range's number of points in a grid",
    )
    start: list[dict[str, Any]] = Field(
        [], description="values to begin with, by dotted keys, after the configured ones"
    )
    searcher: Literal["random", "grid", "tpe"] = Field(
        "tpe", description="tpe: Optuna's, which learns from the trials before (arXiv 2304.11127)"
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    trials: int = Field(
        30, ge=1, description="the configured values among them; a grid has as many as its points"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="no trial begins or goes on after these, then the finalists run; "
        "null: no limit",
    )
    seed: int = Field(0, ge=0, description="decides what is drawn")
    concurrency: int | None = Field(
        None, ge=1, description="trials at a time; null: as many as the cluster has room for"
    )
    cpus_per_trial: float = Field(1.0, gt=0, description="logical CPUs, also a part of one")
    gpus_per_trial: float | None = Field(
        None, ge=0, description="also a part of one; null: 1 where finetune.gpu finds one"
    )
    max_failures: int = Field(
        2, ge=0, description="restarts of a trial whose worker is lost, before it counts as failed"
    )
    finalists: int = Field(
        3, ge=1, description="best trials that are run again; the configured values always are"
    )
    seeds: int = Field(3, ge=1, description="runs of each finalist, each with another seed")
    test: bool = Field(
        True, description="measure the winner on evaluate.source, once, when all is chosen"
    )
    keep_models: bool = Field(
        False, description="keep the model of every trial, not the winner's alone"
    )


#: What may differ when a search goes on: how long, how much at a time, what is kept; and of its
#: trials who computes them and what they log, but nothing that what they learn depends on.
MAY_CHANGE = frozenset(
    {
        *(f"finetune.{key}" for key in ALIKE_MAY_CHANGE - {"on_non_finite"}),
        "tune.trials",
        "tune.minutes",
        "tune.concurrency",
        "tune.cpus_per_trial",
        "tune.gpus_per_trial",
        "tune.max_failures",
        "tune.finalists",
        "tune.seeds",
        "tune.test",
        "tune.keep_models",
    }
)


class Searched(Settings):
    """The sections that a search may change."""

    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig.model_validate({})

    def with_values(self, values: Mapping[str, Any], source: str = "tune.space") -> Searched:
        """The same with other values at some dotted keys.

        Raises:
            ConfigError: a key that is not there, a value that is refused.
        """
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            *parents, leaf = key.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
                if not isinstance(section, dict):
                    raise ConfigError(f"{source}: {key}: {parent} has no keys of its own")
            section[leaf] = value
        return build(Searched, tree, source)

    def settings(self) -> dict[str, Any]:
        """All values by dotted keys."""
        return dict(flatten(self.model_dump(mode="json")))


def read_space(config: TuneConfig, base: Searched) -> Space:
    """Read the search space and look at all that can be wrong with it, before any trial starts.

    Raises:
        ConfigError: a key that is misspelt or can't be searched, an empty range, a value that the
            configuration refuses.
    """
    space = Space.parse(config.space)
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
    _check_scheduler(config, space, base)
    return space


def compares_unequal(config: TuneConfig, space: Space, base: Searched) -> bool:
    """Whether rungs would compare trials that were trained for unequal epochs.

    A number of evaluations is spread over each trial's own length: the first evaluation past a
    rung is then another one for every length.
    """
    rungs = config.scheduler.kind in ("asha", "hyperband")
    lengths = {f"finetune.{name}" for name in LIMITS} & {d.key for d in space.dimensions}
    return rungs and bool(lengths) and base.finetune.evaluations is not None


def most_epochs(space: Space, base: Searched, steps_per_epoch: int, tokens_per_epoch: int) -> float:
    """The epochs of the longest trial, as far as the space tells."""
    ends = {d.key.removeprefix("finetune."): d.ends for d in space.dimensions}
    config = base.finetune
    if "epochs" in ends:
        return float(max(ends["epochs"]))
    if "steps" in ends:
        return float(max(ends["steps"])) / steps_per_epoch
    steps = config.budget(steps_per_epoch, tokens_per_epoch).steps or steps_per_epoch
    return steps / steps_per_epoch


def _check_key(key: str, base: Searched, where: str) -> None:
    for name, why in _FIXED.items():
        if key == name or key.startswith(f"{name}."):
            raise ConfigError(f"{where}: {key} can't be searched: {why}")
    section = key.partition(".")[0]
    if section == "model" and base.finetune.initialize_from != "scratch":
        raise ConfigError(
            f"{where}: {key}: the model's shape is that of the pretrained one; search over it "
            "with finetune.initialize_from=scratch"
        )
    if section not in ("model", "finetune"):
        raise ConfigError(
            f"{where}: {key}: trials are fine-tuning runs, which read the sections finetune and "
            "model alone"
        )


def _check_ends(dimension: Dimension, space: Space, base: Searched) -> None:
    """Try the ends of a range, or each choice: alone, or else beside draws of the other keys."""
    for value in dimension.ends:
        try:
            base.with_values({dimension.key: value})
        except ConfigError as error:
            draws = random.Random(0)
            for _ in range(_TRIES):
                if accepts(base, {**space.draw(draws), dimension.key: value}):
                    break
            else:
                raise error from None


def accepts(base: Searched, values: Values) -> bool:
    """Whether the configuration takes these values together."""
    try:
        base.with_values(values)
    except ConfigError:
        return False
    return True


def _check_scheduler(config: TuneConfig, space: Space, base: Searched) -> None:
    if base.finetune.minutes is not None:
        raise ConfigError(
            f"finetune.minutes={base.finetune.minutes:g}: {_FIXED['finetune.minutes']} or set "
            "finetune.minutes=null and finetune.epochs"
        )
    if config.scheduler.kind != "pbt":
        return
    for dimension in space.dimensions:
        if dimension.key not in MUTABLE:
            raise ConfigError(
                f"tune.space: {dimension.key} can't change while a trial runs, as pbt demands; "
                f"leave it out, or set tune.scheduler.kind=asha (pbt searches over "
                f"{', '.join(sorted(MUTABLE))})"
            )
        if dimension.when:
            raise ConfigError(
                f"tune.space: {dimension.key}: pbt knows no conditions; leave `when` out"
            )
