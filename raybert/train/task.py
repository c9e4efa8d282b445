"""What the training loop is given: a task (model, batches, loss, evaluation) and control signals.

A task is built on every worker from its `TrainSpec`, which is pickled and sent there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from raybert.errors import RaybertError
from raybert.records import Metrics
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

    def split(self, rows: int) -> Sequence[Batch]:
        """The same rows in batches of at most `rows`; itself where it has no more."""


class Task(Protocol):
    """A model with its batches, its loss and its evaluation, on one rank."""

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

    def evaluate(self) -> Metrics:
        """Evaluate on all ranks together."""


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

    @property
    def order_micro_batch_size(self) -> int | None:
        """Rows of a micro-batch in the run's order; None: the configured number."""

    def inputs(self) -> dict[str, str]:
        """Hashes of what the run reads, by a name for messages."""

    def make_task(self, group: Group, loader: LoaderConfig) -> Task:
        """Build the task on a worker."""

    def finish(self, task: Task, run: Folder, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write the product of the best weights, on rank 0; returns lines of the result."""


class Stopped(RaybertError):
    """The run was asked to stop; its state is in a checkpoint."""


class Preempted(RaybertError):
    """A worker's node will be taken away; the run's state is in a checkpoint."""


class ReplicasDiffer(RaybertError):
    """The weights of the ranks are not equal; those of the last checkpoint were one rank's."""


@dataclass(frozen=True)
class ControlSignals:
    """Requests from outside, polled before every step; each may come from any rank."""

    stop: Callable[[], bool] = lambda: False  # save and end the run
    preempt: Callable[[], bool] = lambda: False  # save and end: this rank's node will be taken away
    save: Callable[[], bool] = lambda: False  # write a checkpoint now


NO_SIGNALS = ControlSignals()
