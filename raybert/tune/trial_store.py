"""The trials of a search in the storage: their values, their progress and how they ended.

A trial is a training run in a folder of its own. Beside the run's files it has `trial.json`,
written before it starts, and `outcome.json`, written when it has ended. A search resumes from these
files, not from Ray Tune's state, which lags behind.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from raybert.records import metric_of
from raybert.storage.folder import Folder
from raybert.train.metrics_log import SEGMENTS, parse_lines, read_metrics
from raybert.train.run_folder import RESULT
from raybert.tune.space import Values

TRIAL, OUTCOME = "trial.json", "outcome.json"

#: waiting: not started, or to be resumed; stopped: by the scheduler or at the time limit.
State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a trial on the validation texts."""

    step: int
    epoch: float
    score: float  # higher is better
    value: float  # of the metric that selects, in its own unit
    loss: float
    time: float  # seconds since 1970
    metric: str = "accuracy"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Evaluation:
        """Read a record of the run's metrics log."""
        metric = metric_of(record)
        numbers = (record.get(key) for key in ("epoch", "score", metric, "loss"))
        epoch, score, value, loss = (float("nan") if n is None else float(n) for n in numbers)
        when = float(record.get("time") or time.time())
        return cls(int(record["step"]), epoch, score, value, loss, when, metric)


@dataclass
class TrialRecord:
    """A trial and its results."""

    name: str
    values: Values
    seed: int
    state: State = "waiting"
    reason: str = ""  # why it was stopped or failed
    started: float = 0.0  # seconds since 1970
    ended: float | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    exploits: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of training, over all attempts
    step: int = 0  # the latest reported one
    total_steps: int | None = None

    @property
    def best(self) -> Evaluation | None:
        """Its best evaluation; a run keeps the weights of that one."""
        known = [e for e in self.evaluations if e.score == e.score]  # not NaN
        return max(known, key=lambda e: e.score, default=None)

    @property
    def score(self) -> float:
        """The best score, by which trials are ranked; minus infinity if there is none."""
        return float("-inf") if self.best is None or self.state == "failed" else self.best.score

    @property
    def epoch(self) -> float:
        """The epoch of its last evaluation."""
        return self.evaluations[-1].epoch if self.evaluations else 0.0

    def as_json(self, metric: str) -> dict[str, Any]:
        """The record for the report and for `--json`; `metric` is that of the search."""
        return {
            "trial": self.name,
            "state": self.state,
            "why": self.reason,
            "values": self.values,
            "seed": self.seed,
            "score": None if self.best is None else self.best.score,
            "metric": metric,
            metric: None if self.best is None else self.best.value,
            "loss": None if self.best is None else self.best.loss,
            "epoch": self.epoch,
            "begun": self.started,
            "ended": self.ended,
            "seconds": round(self.seconds, 1),
            "evaluations": [[e.epoch, e.score, e.value, e.time] for e in self.evaluations],
            "exchanges": self.exploits,
        }


class TrialStore:
    """The trials in a folder, each in a folder of its own."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def read_all(self) -> list[TrialRecord]:
        """Read all trials, in the order of their names."""
        return [
            self._read(name)
            for name in self.folder.names()
            if (self.folder / name).exists(TRIAL)
        ]  # fmt: skip

    def create(self, name: str, values: Values, seed: int) -> TrialRecord:
        """Write a trial that is about to start."""
        trial = TrialRecord(name, values, seed, started=round(time.time(), 3))
        write_trial(self.folder_of(name), values, seed, trial.started, [])
        return trial

    def close(self, trial: TrialRecord, state: State, reason: str = "") -> None:
        """Write how a trial ended."""
        trial.state, trial.reason = state, reason
        trial.ended = round(time.time(), 3)
        outcome = {"state": state, "why": reason, "ended": trial.ended}
        self.folder_of(trial.name).write_json(OUTCOME, outcome)

    def reopen(self, trial: TrialRecord) -> None:
        """Delete how a trial ended: it resumes from its checkpoints, if it has some."""
        self.folder_of(trial.name).delete(OUTCOME)
        trial.state, trial.reason, trial.ended = "waiting", "", None

    def refresh(self, trial: TrialRecord) -> None:
        """Update a trial from the files that its workers have written."""
        found = self._read(trial.name)
        trial.values, trial.exploits = found.values, found.exploits
        trial.evaluations, trial.seconds = found.evaluations, found.seconds

    def folder_of(self, name: str) -> Folder:
        """A trial's folder."""
        return self.folder / name

    def _read(self, name: str) -> TrialRecord:
        run = self.folder_of(name)
        values = run.read_json(TRIAL)
        started, exploits = float(values["begun"]), values["exchanges"]
        trial = TrialRecord(
            name, values["values"], int(values["seed"]), started=started, exploits=exploits
        )
        # Evaluations before an exploit are of weights that the trial has given up.
        since = trial.exploits[-1]["step"] if trial.exploits else -1
        records = [r for r in read_metrics(run) if r["kind"] == "eval" and r["step"] > since]
        trial.evaluations = [Evaluation.from_record(record) for record in records]
        trial.seconds = training_seconds(run)
        if run.exists(OUTCOME):
            outcome = run.read_json(OUTCOME)
            trial.state, trial.reason = outcome["state"], outcome["why"]
            trial.ended = outcome["ended"]
        elif run.exists(RESULT):  # the driver was killed before it recorded the end
            trial.state = "finished"
            trial.ended = trial.evaluations[-1].time if trial.evaluations else None
        return trial


def write_trial(
    run: Folder, values: Values, seed: int, started: float, exploits: list[dict[str, Any]]
) -> None:
    """Write `trial.json`: a trial's current values and its exploits."""
    trial = {"values": values, "seed": seed, "begun": started, "exchanges": exploits}
    run.write_json(TRIAL, trial)


def training_seconds(run: Folder) -> float:
    """The seconds of a run's attempts, each from its first logged line to its last."""
    total = 0.0
    for name in (run / SEGMENTS).names():
        records = parse_lines((run / SEGMENTS).read_bytes(name)).records
        times = [record["time"] for record in records if "time" in record]
        total += max(times) - min(times) if times else 0.0
    return total


def rank_trials(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The trials that have a score, the best first; of equal ones the older first."""
    known = [trial for trial in trials if trial.score != float("-inf")]
    return sorted(known, key=lambda trial: (-trial.score, trial.name))


def count_states(trials: Iterable[TrialRecord]) -> dict[str, int]:
    """How many trials are in each state."""
    counts = dict.fromkeys(ENDED, 0)
    for trial in trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    return counts
