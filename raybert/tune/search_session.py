"""A search under way: its trials, the room that they have, and how each of them goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ray.tune.experiment import Trial

from raybert.cluster.session import Resources
from raybert.errors import ConfigError
from raybert.train.settings import TrainConfig
from raybert.tune.settings import TuneConfig
from raybert.tune.trial_store import ENDED, Evaluation, TrialRecord, TrialStore

_SETTLED_SECONDS = 60  # after which a trial that is over has written all that it will
_SPARE_CPUS = 2  # logical ones of a Ray started here: Ray Data's, which trials have no use for


class TrialSource(Protocol):
    """Where trials come from."""

    entries: list[TrialRecord]

    def next(self) -> TrialRecord | None:
        """The next trial to run; None: there are no more."""

    def end(self, entry: TrialRecord) -> None:
        """Hear of a trial that has ended."""


class TrialListener(Protocol):
    """What wants to know how trials go; called from Ray Tune's thread."""

    def evaluated(self, entry: TrialRecord) -> None:
        """A trial has one more evaluation."""

    def ended(self, entry: TrialRecord) -> None:
        """A trial is over."""


@dataclass(frozen=True)
class TrialResources:
    """How many trials run at a time, and what the process of each is given."""

    trials: int
    cpus: float  # nothing, as of GPUs, where the workers of a trial are other processes
    gpus: float

    @property
    def request(self) -> dict[str, float]:
        """What Ray is asked for.

        It wants something to be asked for. A thousandth of a CPU would leave less than whole ones
        on that node, and a worker that waits for one would find none: so it is a byte of memory.
        """
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: count for name, count in wanted.items() if count} or {"memory": 1}


def trial_resources(
    config: TuneConfig, training: TrainConfig, gpu: bool, resources: Resources
) -> TrialResources:
    """Divide the cluster among trials.

    Args:
        config: the search.
        training: of each trial: how many workers it has.
        gpu: whether they train on GPUs.
        resources: what the cluster has.

    Raises:
        ConfigError: there is no room for a single trial: it would wait for ever.
    """
    if training.max_workers > 1:
        room, asked = _of_several_workers(training, gpu, resources)
    else:
        room, asked = _of_one_worker(config, gpu, resources)
    if room.trials < 1:
        spare = _SPARE_CPUS if resources.started_here else 0
        raise ConfigError(
            f"{asked}: the cluster has {resources.cpus - spare:g} CPUs and {resources.gpus:g} GPUs "
            f"for trials, {_largest(resources, spare)} on its largest node; lower that, or add "
            "nodes"
        )
    return replace(room, trials=min(room.trials, config.concurrency or room.trials))


def _of_one_worker(
    config: TuneConfig, gpu: bool, resources: Resources
) -> tuple[TrialResources, str]:
    """The room of trials that train in their own process, each on one node."""
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
    gpus = float(gpu) if gpus is None else gpus
    asked = f"tune.cpus_per_trial={cpus:g}"
    spare = _SPARE_CPUS if resources.started_here else 0
    fits = 0
    for node_cpus, node_gpus in _nodes(resources):
        counts = [(node_cpus - spare) // cpus]
        if gpus:
            counts.append(node_gpus // gpus)
        fits += max(0, int(min(counts)))
    if gpus:
        asked += f" and tune.gpus_per_trial={gpus:g}"
    return TrialResources(fits, cpus, gpus), asked


def _of_several_workers(
    training: TrainConfig, gpu: bool, resources: Resources
) -> tuple[TrialResources, str]:
    """The room of trials whose workers Ray Train starts, each on any node.

    It asks for their CPUs itself. One more stays free, as `check_resources` wants it of any run.
    """
    nodes = _nodes(resources)
    fits = sum(int(cpus) for cpus, _ in nodes) - 1
    if gpu:
        fits = min(fits, sum(int(min(cpus, gpus)) for cpus, gpus in nodes))
    trials = fits // training.max_workers
    if not trials and fits >= training.min_workers:  # a range: as many workers as there is room for
        trials = 1
    return TrialResources(trials, 0.0, 0.0), f"finetune.workers={training.min_workers}"


def _nodes(resources: Resources) -> Sequence[tuple[float, float]]:
    return resources.nodes or [(resources.cpus, resources.gpus)]


def _largest(resources: Resources, spare: int) -> str:
    cpus, gpus = max(_nodes(resources), key=lambda node: (node[1], node[0]))
    return f"{cpus - spare:g} and {gpus:g}"


@dataclass
class Session:
    """A search under way: what Ray Tune's parts, the display and the driver know together."""

    source: TrialSource
    ledger: TrialStore
    room: TrialResources
    deadline: float | None = None  # of time.monotonic
    watchers: list[TrialListener] = field(default_factory=list)
    all_at_once: bool = False  # trials are compared while they run: they take turns
    keeps_checkpoints: bool = False  # of trials that are over: others may take them over
    retries: bool = False  # a later session goes on with trials that have failed
    running: dict[str, Trial] = field(default_factory=dict)
    is_stopping: bool = False
    superseded: str | None = None  # another driver is at the same search
    _is_exhausted: bool = False
    _swept: set[str] = field(default_factory=set)

    @property
    def out_of_time(self) -> bool:
        """Whether the search's minutes are over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def is_ending(self) -> bool:
        """Whether trials are to end, wherever they are."""
        return self.is_stopping or self.out_of_time

    @property
    def is_over(self) -> bool:
        """Whether no trial is to begin any more."""
        return self._is_exhausted or self.is_ending

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another trial."""
        return self.busy >= self.room.trials

    @property
    def busy(self) -> int:
        """Trials that have a worker, or wait for one."""
        return sum(t.status in (Trial.PENDING, Trial.RUNNING) for t in self.running.values())

    @property
    def is_idle(self) -> bool:
        """Whether no trial runs, or would go on."""
        return all(trial.is_finished() for trial in self.running.values())

    def next(self) -> TrialRecord | None:
        """The next trial, if there is room for one, or it may wait for its turn."""
        if self.is_over or (self.is_full and not self.all_at_once):
            return None
        entry = self.source.next()
        self._is_exhausted = entry is None
        return entry

    def entry(self, trial: Trial) -> TrialRecord:
        """What the ledger has of a trial."""
        return next(e for e in self.source.entries if e.name == trial.trial_id)

    def hear(self, trial: Trial, result: dict[str, Any]) -> None:
        """A trial was evaluated."""
        entry = self.entry(trial)
        if "accuracy" in result and not {"failed", "interrupted"} & result.keys():
            entry.evaluations.append(Evaluation.of({**result, "time": time.time()}))
            for watcher in self.watchers:
                watcher.evaluated(entry)

    def end(self, trial: Trial, error: str | None = None) -> None:
        """A trial is over: write down how."""
        entry, result = self.entry(trial), trial.last_result or {}
        self.running.pop(entry.name, None)
        is_over = error is not None or {"ended", "failed"} & {k for k, v in result.items() if v}
        if result.get("interrupted") or (self.is_stopping and not is_over):
            entry.state = "waiting"  # the next session goes on with it
            if "superseded" in result:
                self.superseded, self.is_stopping = str(result["superseded"]), True
            return
        self.ledger.refresh(entry)
        if error is not None or "failed" in result:
            self.ledger.close(entry, "failed", error or str(result["failed"]))
        elif result.get("ended"):
            self.ledger.close(entry, "finished")
        else:
            why = "the time was up" if self.out_of_time else f"stopped at epoch {entry.epoch:g}"
            self.ledger.close(entry, "stopped", why)
        self.source.end(entry)
        for watcher in self.watchers:
            watcher.ended(entry)
        if not self.keeps_checkpoints:
            self.sweep(_SETTLED_SECONDS)

    def sweep(self, seconds: float = 0.0) -> None:
        """Delete the checkpoints of trials that were over so long ago: nothing goes on from them.

        One that has just ended may still be written to.
        """
        for entry in self.source.entries:
            is_old = entry.ended is not None and time.time() - entry.ended >= seconds
            is_over = entry.state in ENDED and not (self.retries and entry.state == "failed")
            if is_old and is_over and entry.name not in self._swept:
                self._swept.add(entry.name)
                self.ledger.run(entry.name).delete("checkpoints")
