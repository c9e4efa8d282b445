"""The state of a run: what a checkpoint holds, and how every rank gets it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from raybert.records import Metrics, finite
from raybert.train.averages import WeightAverages
from raybert.train.checkpoint import Snapshot
from raybert.train.distributed import Group
from raybert.train.optimizers import optimizer_tensors, restore_optimizer
from raybert.train.sharding import is_sharded, shard_like, whole
from raybert.train.task import ReplicasDiffer
from raybert.train.tensor_file import Tensors, checksum_tensors


@dataclass
class Progress:
    """How far a run has come: the part of a checkpoint that is not tensors."""

    step: int = 0
    total_steps: int | None = None  # None while a run limited by minutes measures its speed
    warmup_steps: int | None = None
    minutes: float | None = None  # the limit that total_steps was computed from, if any
    corrected_step: int = 0  # at which total_steps was computed again; 0: not yet
    tokens: float = 0.0
    seconds: float = 0.0  # of training, over all attempts
    best_score: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, Any] | None = None
    stale_evaluations: int = 0  # since the best one
    skipped: int = 0  # steps with a gradient that is not finite
    restarts: int = 0

    def restore(self, state: dict[str, Any]) -> None:
        """Take the values of a checkpoint."""
        vars(self).update(vars(Progress(**state)))

    def note_best(self, metrics: Metrics) -> bool:
        """Note an evaluation; return whether its score is the best. NaN never is."""
        if not metrics["score"] > (-float("inf") if self.best_score is None else self.best_score):
            self.stale_evaluations += 1
            return False
        self.best_score, self.best_step = metrics["score"], self.step
        self.best_metrics = finite(metrics)
        self.stale_evaluations = 0
        return True

    def forget_best(self) -> None:
        """Drop the best evaluation, whose weights are gone."""
        self.best_score = self.best_step = self.best_metrics = None


@dataclass(frozen=True)
class TrainState:
    """What training changes: tensors on their device, and the progress."""

    model: nn.Module  # the task's own, or a sharded copy of it
    optimizer: torch.optim.Optimizer
    averages: WeightAverages
    progress: Progress

    def snapshot(self, group: Group) -> Snapshot:
        """Copy everything to the CPU, whole, on rank 0; all ranks call it, and send their parts."""
        return Snapshot(
            self.progress.step,
            self.whole_model(group),
            _copy(optimizer_tensors(self.optimizer), group),
            asdict(self.progress),
            _copy(self.averages.tensors(), group),
        )

    def whole_model(self, group: Group) -> Tensors:
        """Copy the weights to the CPU, whole, on rank 0; all ranks call it."""
        return _copy(self.model.state_dict(), group)

    def check_replicas(self, group: Group, *, with_optimizer: bool) -> None:
        """Raise ReplicasDiffer on all ranks unless their weights and averages are equal."""
        if group.world_size == 1 or any(is_sharded(p) for p in self.model.parameters()):
            return  # there are no replicas
        tensors = [*self.model.state_dict().values(), *self.averages.tensors().values()]
        if with_optimizer:
            tensors += optimizer_tensors(self.optimizer).values()
        sums = group.gather(checksum_tensors(tensors))
        others = [str(rank) for rank, found in enumerate(sums) if found != sums[0]]
        if others:
            raise ReplicasDiffer(
                f"step {self.progress.step}: the weights of rank {', '.join(others)} differ from "
                "those of rank 0: a fault of a node, or different processors that round differently"
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Put the tensors of a snapshot back; the progress stays as it is."""
        self.model.load_state_dict(snapshot.model)
        restore_optimizer(self.optimizer, snapshot.optimizer)
        self.averages.restore(snapshot.averages)

    def load_on_all_ranks(
        self, read: Callable[[], Snapshot | None], group: Group, timeout_s: float
    ) -> Snapshot | None:
        """Read a checkpoint on rank 0, which sends each of the others what it keeps of it.

        They read nothing: a storage may list or return other files to them, and each would read as
        much again. However long rank 0 reads, they wait. Whole tensors are sent one by one, and a
        rank keeps its part of them, so that a checkpoint does not depend on how many ranks wrote
        it. Raises what `read` does, on all ranks.
        """
        found: Snapshot | None = None

        def load() -> None:
            nonlocal found
            found = read()

        group.wait_for(load if group.rank == 0 else _nothing, timeout_s)
        header = group.broadcast(found and (found.step, found.state, found.commit))
        if header is None:
            return None
        step, state, commit = header
        parts = (found.model, found.optimizer, found.averages) if found is not None else (None,) * 3
        model, optimizer, averages = (group.broadcast_tensors(part, self._keep()) for part in parts)
        return Snapshot(step, model, optimizer, state, averages, commit)

    def _keep(self) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """What this rank keeps of a whole tensor: its part where the parameter is sharded."""
        parameters = dict(self.model.named_parameters())

        def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
            parameter = parameters.get(name.rpartition("|")[0] or name)  # or one's optimizer state
            if parameter is None or not is_sharded(parameter) or tensor.shape != parameter.shape:
                return tensor
            return shard_like(tensor, parameter)

        return keep


def _copy(tensors: Tensors, group: Group) -> Tensors:
    """Copy tensors to rank 0's CPU, one by one: no other rank has more than one of them whole."""
    copies = {}
    for name, tensor in tensors.items():
        mine = tensor.detach()
        gathered = whole(mine)
        if group.rank == 0:
            copies[name] = gathered.to("cpu", copy=gathered is mine).contiguous()
    return copies


def _nothing() -> None:
    """What the other ranks do while rank 0 reads."""
