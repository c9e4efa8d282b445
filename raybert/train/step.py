"""One optimizer step: forward and backward over this rank's micro-batches, and the update.

A step's loss is its sum over all micro-batches of all ranks, divided by what all of them predict:
any number of ranks, with any number of micro-batches each, computes the same gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from raybert.data.keyed import key_of
from raybert.train.autocast import autocast
from raybert.train.distributed import Group
from raybert.train.optimizers import set_lr
from raybert.train.settings import TrainConfig
from raybert.train.state import TrainState
from raybert.train.task import Batch, Task


class TrainStep:
    """Takes the steps of a run on this rank."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        group: Group,
        state: TrainState,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> None:
        """Set up; `on_batch` gets every micro-batch before it is trained on, for digests."""
        self._task, self._config, self._group = task, config, group
        self._state, self._on_batch = state, on_batch
        self._module: nn.Module = task.model
        self._loss = torch.zeros((), dtype=torch.float64, device=group.device)
        self._count = 0
        self.grad_norm = 0.0  # of the last step, before clipping; the same on all ranks

    def wrap(self) -> None:
        """Put the model into DDP; again after every change of what is trained."""
        module: nn.Module = self._task.model
        if self._config.compile:
            module = torch.compile(module)  # type: ignore[assignment]
        self._module = self._group.wrap(module, deterministic=self._config.deterministic)

    def run(self, batches: Sequence[Batch], step: int, count: float, lr: float) -> bool:
        """Take a step.

        Args:
            batches: this rank's micro-batches.
            step: the step's number.
            count: the predicted tokens, or rows, of the global batch.
            lr: the learning rate.

        Returns:
            Whether the gradient was finite; if not, the weights are as they were.
        """
        self._backward(batches, step, count)
        set_lr(self._state.optimizer, lr)
        parameters = [p for p in self._task.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm, foreach=True)
        self.grad_norm = float(norm)
        is_finite = math.isfinite(self.grad_norm)
        if is_finite:
            self._state.optimizer.step()
            self._state.averages.update(step)
        self._state.optimizer.zero_grad(set_to_none=True)
        return is_finite

    def _backward(self, batches: Sequence[Batch], step: int, count: float) -> None:
        """Accumulate the gradient of the global batch's mean loss."""
        device = self._group.device
        work = [batch for batch in batches if batch.count] or [self._task.empty_batch()]
        # DDP averages over ranks; a step's loss is the sum over all ranks by the global count.
        scale = self._group.world_size / max(1.0, count)
        for index, batch in enumerate(work):
            if self._on_batch is not None and batch.count:
                self._on_batch(batch)
            # Draws such as dropout's depend on the micro-batch, not on the rank that computes it.
            seed = key_of("draws", self._config.seed, step, batch.micro_batch_index) >> 1
            torch.manual_seed(seed)
            is_last = index == len(work) - 1  # DDP averages gradients in its backward pass only
            no_sync = getattr(self._module, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if is_last else no_sync():
                with autocast(self._config.precision, device):
                    loss = self._task.loss(self._module, batch)
                torch.autograd.backward(loss * scale)
            self._loss += loss.detach()
        self._count += sum(batch.count for batch in batches)

    def mean_loss(self) -> float:
        """The mean loss over all ranks since the last call, which all ranks make together."""
        loss, count = self._group.sum([float(self._loss), self._count])
        self._loss.zero_()
        self._count = 0
        return loss / max(1.0, count)
