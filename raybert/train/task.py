"""What the training loop needs of a task: its model, batches, loss and evaluation.

A task is built on every worker from its `TrainSpec`, which travels there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from raybert.storage.folder import Folder
from raybert.train.distributed import Group
from raybert.train.settings import TrainConfig


class Batch(Protocol):
    """A micro-batch of a step."""

    @property
    def step(self) -> int:
        """The step that it belongs to."""

    @property
    def micro_batch_index(self) -> int:
        """Its index in the global batch."""

    @property
    def count(self) -> int:
        """What the loss is averaged over: predicted tokens, or rows."""

    @property
    def tokens(self) -> int:
        """Tokens read, for the throughput."""

    def digest(self) -> str:
        """A hash of the content."""


class Task(Protocol):
    """A model with its batches, its loss and its evaluation, on one rank."""

    last: dict[str, Any]  # the metrics of the last evaluation; at the end those of the best one

    @property
    def model(self) -> nn.Module:
        """The model, on the group's device."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the data."""

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over the data."""

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for a token; 0 where unknown."""

    @property
    def needs_total(self) -> bool:
        """Whether the batches depend on how many steps the run has."""

    def batches(self, first_step: int, total_steps: int | None) -> Iterator[Sequence[Batch]]:
        """Yield this rank's micro-batches of each step from `first_step` on, without end."""

    def empty_batch(self) -> Batch:
        """A micro-batch with a count of 0: for a rank without rows in an epoch's last step."""

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Run the model, wrapped in DDP or not; return the loss summed over the batch, fp32 []."""

    def lr_scale(self, name: str) -> float:
        """The factor of the learning rate for a parameter."""

    def prepare(self, step: int) -> bool:
        """Freeze or unfreeze parameters for a step; return whether anything changed."""

    def evaluate(self) -> dict[str, Any]:
        """Evaluate on all ranks together; the metrics include `score`: higher is better."""


@dataclass(frozen=True)
class LoaderConfig:
    """Where a worker's batches are made: in its own process, or in Ray Data operators."""

    on_ray: bool = False
    cpus: float = 1.0  # logical CPUs for this worker's operators
    memory: int = 256 << 20  # bytes of the object store for their blocks


class TrainSpec(Protocol):
    """A training run before it starts: picklable, sent to the workers."""

    @property
    def config(self) -> TrainConfig:
        """The stage's settings."""

    def inputs(self) -> dict[str, str]:
        """Hashes of what the run reads, by a name for messages."""

    def make_task(self, group: Group, loader: LoaderConfig) -> Task:
        """Build the task on a worker."""

    def finish(self, task: Task, run: Folder) -> dict[str, Any]:
        """Write the run's product from the best weights, on rank 0; return lines of the result."""
