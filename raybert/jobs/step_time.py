"""A model of a step's time on many GPUs, of what checkpoints and failures add, and its limit.

docs/scaling.md has its formulas, the sources of its constants, and what it says. All ranks compute
at once, while the next step's input is made: `seconds = max(compute + exposed + fixed, input)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from raybert.train.sharding import Sharding

_BACKWARD = 2 / 3  # share of a pass that is its backward pass: two products for each of forward
_RECOMPUTED = 3 / 4  # the same where the forward pass is computed again


@dataclass(frozen=True)
class Machines:
    """GPUs in nodes, and what they are connected to; bandwidths are bytes a second, one way."""

    gpus: int = 8
    gpus_per_node: int = 8
    flops: float = 0.3 * 989e12  # a second, that a GPU reaches
    node_bandwidth: float = 450e9  # of an all-reduce within a node, here over NVLink
    network_bandwidth: float = 0.9 * 8 * 400e9 / 8  # of a node: 8 adapters of 400 Gb/s
    latency: float = 10e-6  # seconds of one hop of a collective
    fixed: float = 4e-3  # seconds a step: counts that ranks agree on, the optimizer, launches
    input_rate: float = 14e6  # tokens a second that a node reads and masks
    copy_bandwidth: float = 4e9  # of a checkpoint's copy, for which training waits
    storage_bandwidth: float = 0.25e9  # of one writer, checksums included
    hours_between_failures: float = 50_000.0  # of one GPU
    restart: float = 60.0  # seconds from a failure to the first step

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def seconds_between_failures(self) -> float:
        """Seconds between failures of any GPU."""
        return self.hours_between_failures * 3600 / self.gpus


@dataclass(frozen=True)
class Work:
    """A training step, and how often it is saved."""

    flops: float  # of a step
    tokens: float  # of a step
    parameters: int
    micro_batches: int  # of a step, over all ranks
    gradient_bytes: int = 4  # of a number in which gradients are sent
    bucket_bytes: float = 25e6
    sharding: Sharding = "none"
    recomputes: bool = False
    checkpoint_seconds: float | None = 300.0  # between checkpoints; None: there are none


class StepTime(NamedTuple):
    """Seconds of a step by their cause, and shares of the time that are lost."""

    compute: float
    communication: float  # in all
    exposed: float  # of it, that nothing hides
    input: float
    fixed: float
    idle: float  # of `compute`, that ranks with fewer micro-batches wait
    saving: float  # share of the time in which training waits for a checkpoint
    failing: float  # share of the time that failures cost: work that is repeated, restarts

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return max(self.compute + self.exposed + self.fixed, self.input)

    @property
    def efficiency(self) -> float:
        """Share of the time in which all GPUs compute."""
        useful = max(0.0, 1 - self.saving - self.failing)
        return useful * (self.compute - self.idle) / self.seconds

    @property
    def limit(self) -> str:
        """What costs most, a key of `REMEDIES`."""
        waits = max(0.0, self.input - self.compute - self.exposed - self.fixed)
        losses = {
            "communication": self.exposed / self.seconds,
            "input": waits / self.seconds,
            "fixed": self.fixed / self.seconds,
            "idle": self.idle / self.seconds,
            "saving": self.saving,
            "failing": self.failing,
        }
        return max(losses, key=losses.__getitem__)


#: What costs most, and what changes that.
REMEDIES = {
    "communication": "sums of gradients that no computation hides: a larger global_batch_size, "
    "pretrain.gradients=bf16, or a faster network",
    "input": "the input: more CPUs for each GPU",
    "fixed": "what each step costs whatever its size: a larger global_batch_size",
    "idle": "ranks with fewer micro-batches than others: a global_batch_size that is a multiple of "
    "micro_batch_size x workers",
    "saving": "copies of checkpoints: a longer checkpoint_minutes",
    "failing": "failures of nodes: a shorter checkpoint_minutes, or fewer GPUs",
}


def step_time(work: Work, machines: Machines) -> StepTime:
    """Compute a step's time; of more ranks than micro-batches, some have none."""
    passes = -(-work.micro_batches // machines.gpus)  # of the rank that has most
    factor = 4 / 3 if work.recomputes else 1.0
    one = factor * work.flops / work.micro_batches / machines.flops  # of a micro-batch
    compute = passes * one
    idle = compute - one * work.micro_batches / machines.gpus
    sums, hidden_behind = _communication(work, machines, passes, one)
    tail = min(sums, _transfer(min(work.bucket_bytes, _sent(work)), machines, 2.0))
    exposed = 0.0 if machines.gpus == 1 else max(tail, sums - hidden_behind)
    return StepTime(
        compute=compute,
        communication=sums,
        exposed=exposed,
        input=work.tokens / machines.nodes / machines.input_rate,
        fixed=machines.fixed,
        idle=idle,
        saving=_saving(work, machines),
        failing=_failing(work, machines),
    )


def _sent(work: Work) -> float:
    """The bytes of all gradients."""
    return float(work.gradient_bytes * work.parameters)


def _communication(work: Work, machines: Machines, passes: int, one: float) -> tuple[float, float]:
    """Seconds of a step's collectives, and those of the computation that may hide them."""
    backward = (_RECOMPUTED if work.recomputes else _BACKWARD) * one
    weights = 4.0 * work.parameters
    if work.sharding == "none":  # an all-reduce: each byte is sent twice
        return _transfer(_sent(work), machines, 2.0), backward
    gathers = 1 if work.sharding == "optimizer" else 2 * passes  # for each forward and backward
    seconds = _transfer(weights, machines, float(gathers)) + _transfer(_sent(work), machines, 1.0)
    return seconds, one if work.sharding == "optimizer" else passes * one


def _transfer(size: float, machines: Machines, times: float) -> float:
    """Seconds of a ring in which each rank sends (n - 1) / n of `size` bytes, `times` over."""
    if machines.gpus == 1:
        return 0.0
    inside, nodes = min(machines.gpus, machines.gpus_per_node), machines.nodes
    slowest = max(
        (inside - 1) / inside * size / machines.node_bandwidth,
        (nodes - 1) / nodes * size / machines.network_bandwidth,
    )
    return times * (slowest + machines.latency * math.log2(machines.gpus))


def _copied(work: Work) -> float:
    """The bytes of a checkpoint: weights and two moments in fp32."""
    return 12.0 * work.parameters


def _interval(work: Work, machines: Machines) -> float:
    """Seconds between checkpoints: one is written before the next is begun."""
    asked = work.checkpoint_seconds or math.inf
    return max(asked, _copied(work) / machines.storage_bandwidth)


def _saving(work: Work, machines: Machines) -> float:
    if work.checkpoint_seconds is None:
        return 0.0
    return min(1.0, _copied(work) / machines.copy_bandwidth / _interval(work, machines))


def _failing(work: Work, machines: Machines) -> float:
    """Half an interval is repeated after a failure, and the restart takes its time."""
    if work.checkpoint_seconds is None:
        return 0.0
    lost = _interval(work, machines) / 2 + machines.restart
    return min(1.0, lost / machines.seconds_between_failures)


def best_interval(work: Work, machines: Machines) -> float:
    """Seconds between checkpoints that lose least (Young 1974, doi 10.1145/361147.361115)."""
    copying = _copied(work) / machines.copy_bandwidth
    return math.sqrt(2 * copying * machines.seconds_between_failures)
