"""What the loop and its surroundings agree on: tasks, their batches, and how a run may be ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from raybert.errors import RaybertError


class Batch(Protocol):
    """One micro-batch of a step."""

    @property
    def step(self) -> int:
        """The step that it belongs to."""

    @property
    def micro_batch_index(self) -> int:
        """Its place in the global batch."""

    @property
    def count(self) -> int:
        """What the loss is averaged over: predicted tokens, or rows."""

    @property
    def tokens(self) -> int:
        """Tokens read, for throughput."""

    def digest(self) -> str:
        """A hash of the content."""


class Task(Protocol):
    """What is trained: a model, its batches, its loss and its evaluation."""

    last: dict[str, Any]  # the last evaluation; in the end that of the weights in the model

    @property
    def model(self) -> nn.Module:
        """The model; on the group's device."""

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
        """A micro-batch that counts nothing: for a rank that has none in an epoch's last step."""

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Run the (possibly wrapped) model; return the loss summed over the batch, in fp32."""

    def lr_scale(self, name: str) -> float:
        """A parameter's share of the learning rate."""

    def prepare(self, step: int) -> bool:
        """Freeze or unfreeze for a step; return whether anything changed."""

    def evaluate(self) -> dict[str, Any]:
        """Evaluate with all ranks together; `score` is among the metrics: higher is better."""


class Stopped(RaybertError):
    """The run was asked to stop; its state is in a checkpoint."""


class Preempted(RaybertError):
    """A worker's node is about to go; the run's state is in a checkpoint, to go on elsewhere."""


@dataclass(frozen=True)
class ControlSignals:
    """Requests from outside, polled before every step; each may come from any rank."""

    stop: Callable[[], bool] = lambda: False  # save and end the run
    preempt: Callable[[], bool] = lambda: False  # save and end: this rank's node will be taken away
    save: Callable[[], bool] = lambda: False  # write a checkpoint now


NO_SIGNALS = ControlSignals()
