"""One optimizer step; one evaluation; the best weights at the end of a run.

A step's loss is its sum over all micro-batches of all ranks, divided by the global count of
predicted tokens (or rows): any number of ranks computes the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from raybert.data.keyed import key_of
from raybert.errors import DamagedError
from raybert.model.layers import EncoderLayer
from raybert.records import Metrics
from raybert.storage.retry import retry
from raybert.train.autocast import autocast
from raybert.train.checkpoint import CheckpointStore, Snapshot
from raybert.train.compiled_layers import CompiledLayers
from raybert.train.distributed import Group
from raybert.train.metrics_log import MetricsLog
from raybert.train.optimizers import set_lr
from raybert.train.settings import TrainConfig
from raybert.train.sharding import accumulating, fill, whole, whole_weights
from raybert.train.state import TrainState
from raybert.train.task import Batch, Task
from raybert.train.throughput import Stopwatch


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
        self._task, self._config, self._group = task, config, group
        self._state, self._on_batch = state, on_batch
        self._module: nn.Module = state.model
        for layer in state.model.modules():
            if isinstance(layer, EncoderLayer):
                layer.recomputes = config.activation_checkpointing
        self._compiled = CompiledLayers(state.model) if config.compile else None
        # A GPU skips a step by itself: its work goes on while this thread reads the norm.
        self._skips_on_device = (
            group.device.type == "cuda"
            and isinstance(state.optimizer, torch.optim.AdamW)
            and not config.average_decay
            and state.model is task.model  # the kernel takes no sharded tensors with a whole one
        )
        self._loss = torch.zeros((), dtype=torch.float64, device=group.device)
        self._count = 0
        self._stopwatch = Stopwatch(group.device)
        self.own_seconds = 0.0  # of the last step, before this rank waits for others in its end
        self.grad_norm = 0.0  # of the last step, before clipping; the same on all ranks

    def wrap(self) -> None:
        """Put the model into DDP; again after every change of what is trained."""
        if self._state.model is not self._task.model:
            return  # it is sharded, and sums its gradients itself
        self._module = self._group.wrap(
            self._task.model,
            deterministic=self._config.deterministic,
            gradients=self._config.gradients,
            bucket_mb=self._config.bucket_mb,
        )

    def run(self, batches: Sequence[Batch], step: int, global_count: float, lr: float) -> bool:
        """Take a step over this rank's micro-batches; return whether the gradient was finite.

        `global_count`: predicted tokens, or rows, of the global batch, summed over all ranks.
        """
        before, count_before = self._loss.clone(), self._count
        self._backward(batches, step, global_count)
        set_lr(self._state.optimizer, lr)
        parameters = [p for p in self._state.model.parameters() if p.grad is not None]
        norm = whole(nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm, foreach=True))
        if self._skips_on_device:
            # Not a setting: the fused kernel reads it, as `torch.amp.GradScaler` sets it.
            self._state.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self._state.optimizer.step()
        self.grad_norm = float(norm)  # the one time in a step that this thread waits for a GPU
        self.own_seconds = self._stopwatch.seconds()
        is_finite = math.isfinite(self.grad_norm)
        if is_finite:
            if not self._skips_on_device:
                self._state.optimizer.step()
            self._state.averages.update(step)
        else:  # the step counts for nothing
            self._loss, self._count = before, count_before
        self._state.optimizer.zero_grad(set_to_none=True)
        return is_finite

    def _backward(self, batches: Sequence[Batch], step: int, global_count: float) -> None:
        device = self._group.device
        work = self._parts(batches)
        left = sum(len(parts) for _, parts in work)
        # DDP averages over ranks; the loss is the sum over all ranks, divided by the global count.
        scale = self._group.world_size / max(1.0, global_count)
        self._stopwatch.start()
        for batch, parts in work:
            if self._on_batch is not None and batch.count:
                self._on_batch(batch)
            # Draws such as dropout's depend on the micro-batch, not on the rank that computes it.
            seed = key_of("draws", self._config.seed, step, batch.micro_batch_index) >> 1
            torch.manual_seed(seed)
            for part in parts:
                # Gradients are averaged over ranks in the last backward pass only.
                left -= 1
                is_last = left == 0
                with nullcontext() if is_last else accumulating(self._module, self._config.shards):
                    with autocast(self._config.precision, device), self._compiling():
                        loss = self._task.loss(self._module, part)
                    if is_last:
                        self._stopwatch.stop()
                    torch.autograd.backward(loss * scale)
                self._loss += loss.detach()
        self._count += sum(batch.count for batch in batches)

    def _parts(self, batches: Sequence[Batch]) -> list[tuple[Batch, Sequence[Batch]]]:
        """This rank's micro-batches, each with the parts that it is computed in; never none."""
        # A resumed run may have smaller micro-batches than those of its order.
        rows = self._config.micro_batch_size
        work = [(batch, batch.split(rows)) for batch in batches if batch.count]
        passes = sum(len(parts) for _, parts in work)
        needed = max(1, passes)
        if self._config.shards == "full":  # each pass gathers weights from all ranks
            needed = int(self._group.max(needed))
        empty = self._task.empty_batch()
        return [(empty, [empty])] * (needed - passes) + work

    def _compiling(self) -> AbstractContextManager[None]:
        return nullcontext() if self._compiled is None else self._compiled.in_use()

    def mean_loss(self) -> float:
        """The mean loss over all ranks since the last call, which all ranks make together.

        NaN if no step was taken since, or nothing was predicted.
        """
        loss, count = self._group.sum([float(self._loss), self._count])
        self._loss.zero_()
        self._count = 0
        return loss / count if count else math.nan


class Evaluator:
    """Evaluates a task's model, with the averages in the place of its weights if there are any."""

    def __init__(self, task: Task, config: TrainConfig, group: Group, state: TrainState) -> None:
        self._task, self._config, self._group, self._state = task, config, group, state
        self._last: Metrics | None = None  # of the last evaluation

    def evaluate(self) -> tuple[Metrics, bool]:
        """Evaluate on all ranks; return the metrics, and whether they are the best so far."""
        model = self._task.model
        model.eval()
        with (
            self._state.averages.swapped_in(),
            whole_weights(model, self._state.model),
            torch.inference_mode(),
            autocast(self._config.precision, self._group.device),
        ):
            mine = self._task.evaluate()
        # Rank 0's: all ranks must agree on the best one, whatever their processors round.
        metrics = self._last = self._group.broadcast(mine)
        model.train()
        return metrics, self._state.progress.note_best(metrics)

    def load_best(self, store: CheckpointStore, log: MetricsLog) -> dict[str, Any]:
        """Put the best weights into the task's model, or the last ones if those are lost.

        Returns their metrics and the progress; `best_step` is their step, None if no evaluation
        gave a score. A StorageError if they can't be read for `retry_timeout_s`.
        """
        state, progress = self._state, self._state.progress
        metrics: dict[str, Any] = dict(self._last or {})
        best, best_metrics = progress.best_step, progress.best_metrics
        if best == progress.step:
            metrics = best_metrics or metrics
        elif best is not None:
            config, load = self._config, partial(store.load, best)

            def read() -> Snapshot:
                found = retry(load, config.retry_timeout_s, log.storage_event)
                return replace(found, optimizer={})  # no step will need it: it is not sent

            try:
                found = state.load_on_all_ranks(read, self._group, config.collective_timeout_s)
                assert found is not None
                state.restore(found)
                metrics = best_metrics or {}
            except DamagedError as error:
                message = f"{error}; the model has the weights of step {progress.step} instead"
                log.event("best checkpoint lost", message)
                progress = replace(progress, best_score=metrics["score"], best_step=progress.step)
        state.averages.swap()
        if state.model is not self._task.model:
            fill(self._task.model, dict(state.model.named_parameters()))
        result = {**metrics, **asdict(progress)}
        del result["best_metrics"]
        return result
