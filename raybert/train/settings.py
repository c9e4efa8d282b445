"""Settings of the training loop, for every stage: budget, batches, optimizer, safety, workers."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from raybert.config import NumberOrRange, Range, Settings
from raybert.data.corpus.settings import CorpusConfig
from raybert.model.settings import ModelConfig
from raybert.train.autocast import PrecisionName
from raybert.train.distributed import DDPConfig
from raybert.train.optimizers import OptimizerConfig
from raybert.train.profiling import ProfileConfig
from raybert.train.schedules import ScheduleConfig
from raybert.train.sharding import Sharding


class Elastic(Range):
    """A range of workers: their number follows the cluster while nodes come and go."""

    min: int = Field(1, ge=1, description="with fewer, training waits for nodes")
    max: int = Field(ge=1, description="no more, however large the cluster")


Workers = NumberOrRange[Elastic]

LIMITS = ("steps", "tokens", "epochs", "minutes")  # a run has exactly one


class TrainConfig(ScheduleConfig, OptimizerConfig, DDPConfig):
    """The settings of every training run; a stage's own class adds to them."""

    section: ClassVar[str]  # the stage's section of the configuration, for messages
    default_epochs: ClassVar[float | None] = None  # the limit where none is configured
    alternatives: ClassVar = LIMITS

    seed: int = Field(0, ge=0, description="decides the order, the masks, dropout and the weights")

    steps: int | None = Field(None, ge=1, description="limit in optimizer steps")
    tokens: int | None = Field(None, ge=1, description="limit in tokens read")
    epochs: float | None = Field(None, gt=0, description="limit in passes over the data")
    minutes: float | None = Field(
        None, gt=0, description="limit in minutes of training, evaluation included, start-up not"
    )

    global_batch_size: int = Field(256, ge=1, description="sequences in an optimizer step")
    micro_batch_size: int = Field(32, ge=1, description="sequences in one forward pass")

    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    average_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the exponential moving average of the weights, as 0.99; if set, the "
        "average is evaluated and kept; 0: off",
    )

    precision: PrecisionName = Field("auto", description="auto: bf16 if the hardware multiplies it")
    compile: bool = Field(False, description="run the model through torch.compile")
    activation_checkpointing: bool = Field(
        False,
        description="keep of each layer its input only, and compute the rest again in the "
        "backward pass: a third more operations, a fraction of the memory",
    )
    on_non_finite: Literal["skip", "rollback", "stop"] = Field(
        "skip", description="what to do with a step whose gradient is NaN or infinite"
    )

    evaluations: int | None = Field(
        10, ge=1, description="evaluations spread evenly over the run; null: after every epoch"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations without a better score, after which training ends early; null: "
        "never",
    )
    log_every: int = Field(10, ge=1, description="steps between logged lines")
    checkpoint_minutes: float | None = Field(
        5, gt=0, description="minutes between checkpoints; null: only at the end"
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, beside the best one")
    on_checkpoint_failure: Literal["continue", "stop"] = Field(
        "continue", description="what to do when a checkpoint cannot be written"
    )

    workers: Workers = Field(
        1,
        description="processes that train; {min: 1, max: 8} makes training elastic: it follows "
        "the cluster, with the same batches",
    )
    gpu: Literal["auto", "yes", "no"] = Field("auto", description="whether each worker has a GPU")
    threads: int | None = Field(
        None, ge=1, description="threads of a CPU worker; null: the cores divided by the workers"
    )
    max_failures: int = Field(
        8, ge=0, description="restarts without a new checkpoint in between, before giving up"
    )
    collective_timeout_s: float = Field(
        120, gt=0, description="seconds after which an unresponsive worker counts as lost"
    )
    profile: ProfileConfig | None = Field(
        None,
        description="steps whose trace and table of kernels each rank writes to the run's "
        "profile/, as {steps: [20, 25]}, or one step; null: none",
    )
    digests: bool = Field(False, description="write a digest of every micro-batch, to compare runs")

    @field_validator("gpu", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return ("no", "yes")[value] if isinstance(value, bool) else value  # as YAML reads them

    @model_validator(mode="before")
    @classmethod
    def _default_limit(cls, values: Any) -> Any:
        if cls.default_epochs is None or not isinstance(values, dict):
            return values
        if any(values.get(name) is not None for name in LIMITS):
            return values
        return {**values, "epochs": cls.default_epochs}

    @model_validator(mode="after")
    def _divides(self) -> Self:
        batch, micro = self.global_batch_size, self.micro_batch_size
        if batch % micro:
            near = sorted({max(micro, batch // micro * micro), (batch // micro + 1) * micro})
            raise ValueError(
                f"global_batch_size={batch} is not a multiple of micro_batch_size={micro}; "
                f"use {' or '.join(map(str, near))}"
            )
        if self.max_workers > batch // micro:
            key = "workers" if isinstance(self.workers, int) else "workers.max"
            raise ValueError(
                f"{key}={self.max_workers}, but a step has only {batch // micro} micro-batches "
                f"(global_batch_size={batch}, micro_batch_size={micro}); lower workers or "
                "micro_batch_size"
            )
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) > 1:
            shown = " and ".join(f"{name}={getattr(self, name)}" for name in given)
            raise ValueError(f"{shown}: a run has one limit; keep one, and set the others to null")
        return self

    @property
    def shards(self) -> Sharding:
        """What each worker has only a part of; a stage whose task can be sharded configures it."""
        return "none"

    @property
    def kept_steps(self) -> frozenset[int]:
        """Steps whose checkpoints are kept for ever."""
        return frozenset()

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches in a global batch."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def retry_timeout_s(self) -> float:
        """Seconds for which rank 0 retries a storage that refuses, while the others wait for it."""
        return 0.8 * self.collective_timeout_s

    def limit_in_steps(self, steps_per_epoch: int, tokens_per_epoch: int) -> int | None:
        """The run's limit; None: it is in minutes, which become steps once the speed is known."""
        if self.minutes is not None or self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return math.ceil(self.tokens * steps_per_epoch / max(1, tokens_per_epoch))
        return max(1, round((self.epochs or 1) * steps_per_epoch))


def defaults(section: str) -> dict[str, Any]:
    """The default settings of a section, if it is a stage of training, or what one reads.

    A run of before a setting existed counts as having its default: add settings accordingly.
    """
    known: dict[str, type[Settings]] = {"corpus": CorpusConfig, "model": ModelConfig}
    known |= {stage.section: stage for stage in TrainConfig.__subclasses__()}
    return known[section]().model_dump(mode="json") if section in known else {}


#: Settings that may differ when a run is resumed: its length, its workers, its logging.
MAY_CHANGE = frozenset(
    (
        "steps tokens epochs minutes evaluations log_every checkpoint_minutes checkpoint_steps "
        "keep_checkpoints on_checkpoint_failure workers gpu threads max_failures "
        "collective_timeout_s digests on_non_finite examples bucket_mb profile milestones "
        "branch_from"
    ).split()
)
#: Settings that change nothing but how numbers are rounded, and dropout's draws. They may differ
#: when a run is resumed, unless it is deterministic: one that does not fit into memory goes on.
ROUNDING = frozenset(
    "micro_batch_size compile activation_checkpointing sharding precision gradients".split()
)
#: Those of them that pretraining alone has.
PRETRAINING = frozenset(("examples", "milestones", "branch_from"))
#: Settings that may differ between runs that are compared: all are as long and evaluated as often.
ALIKE_MAY_CHANGE: frozenset[str] = MAY_CHANGE - {*LIMITS, "evaluations"} - PRETRAINING
