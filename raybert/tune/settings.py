"""How a search is configured, and the part of the experiment that its trials change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from raybert.config import KeyOf, Settings, build, flatten
from raybert.errors import ConfigError
from raybert.model.settings import ModelConfig
from raybert.tasks.settings import FinetuneConfig
from raybert.train.settings import ALIKE_MAY_CHANGE
from raybert.tune.samplers import SAMPLERS
from raybert.tune.schedulers.scheduler import SchedulerConfig

#: The first keys matter most; the last ones make every step slower. A search replaces the ranges of
#: a task's own keys by that task's, and leaves out the keys that it does not use (`task_space`).
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


class TuneConfig(Settings):
    """A search for the best fine-tuning."""

    space: dict[str, Any] = Field(
        DEFAULT_SPACE,
        description="dotted keys, each with uniform, log_uniform, integer, log_integer (two "
        "numbers) or choice (a list); `when: {other.key: value}` uses the key only if the other "
        "key has that value, `points` is a range's number of points in a grid; of the default, "
        "a task searches only the keys that it uses",
    )
    start: list[dict[str, Any]] = Field(
        [], description="values of the first trials, by dotted keys, after the configured ones"
    )
    searcher: Annotated[str, KeyOf(SAMPLERS)] = Field(
        "tpe", description="tpe: Optuna's, which learns from earlier trials (arXiv 2304.11127)"
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    trials: int = Field(
        30, ge=1, description="number of trials, including the configured values; a grid ignores it"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="time limit of the search, after which trials stop and the finalists run; "
        "null: no limit",
    )
    seed: int = Field(0, ge=0, description="seed of the sampler")
    concurrency: int | None = Field(
        None, ge=1, description="trials at a time; null: as many as fit on the cluster"
    )
    cpus_per_trial: float = Field(1.0, gt=0, description="logical CPUs; may be a fraction")
    gpus_per_trial: float | None = Field(
        None, ge=0, description="may be a fraction; null: 1 if finetune.gpu uses GPUs"
    )
    max_failures: int = Field(
        2, ge=0, description="restarts of a trial whose worker is lost, before it counts as failed"
    )
    finalists: int = Field(
        3, ge=1, description="best trials that are run again; the configured values always are"
    )
    seeds: int = Field(3, ge=1, description="runs of each finalist, each with another seed")
    test: bool = Field(True, description="measure the winner, once, on evaluate.source")
    keep_models: bool = Field(
        False, description="keep the model of every trial, not only the winner's"
    )


#: Settings that may differ when a search is resumed: its length, its concurrency, what it keeps,
#: and of its trials the settings that do not affect what they learn.
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


class TrialConfig(Settings):
    """The configuration of a trial: the sections that a search may change."""

    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig.model_validate({})

    def with_values(self, values: Mapping[str, Any], source: str = "tune.space") -> TrialConfig:
        """A copy with other values at dotted keys; a ConfigError if one is unknown or invalid."""
        tree = self.model_dump(mode="json")
        for key, value in values.items():
            *parents, leaf = key.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
                if not isinstance(section, dict):
                    raise ConfigError(f"{source}: {key}: {parent} has no keys of its own")
            section[leaf] = value
        return build(TrialConfig, tree, source)

    def accepts(self, values: Mapping[str, Any]) -> bool:
        """Whether a copy with these values is valid."""
        try:
            self.with_values(values)
        except ConfigError:
            return False
        return True

    def flat(self) -> dict[str, Any]:
        """All values by dotted keys."""
        return dict(flatten(self.model_dump(mode="json")))
