"""The trials of a search, as the storage knows them: what was asked, how far each came, its end.

A trial is a run like any other, in a folder named by its number. Beside the run's own files lie
`trial.json`, written before it starts, and `outcome.json`, written when it is over. A search that
was killed reads all this again, and counts no trial twice, whatever Ray Tune remembered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from raybert.storage.folder import Folder
from raybert.train.metrics_log import SEGMENTS, parse_lines, read_metrics
from raybert.train.run import RESULT
from raybert.tune.space import Values

TRIAL, OUTCOME = "trial.json", "outcome.json"

#: waiting: it was begun, or will be; stopped: by the scheduler, or for the time was up.
State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Evaluation:
    """What a trial was worth at some point."""

    step: int
    epoch: float
    score: float
    accuracy: float
    loss: float
    time: float  # seconds since 1970

    @classmethod
    def of(cls, record: dict[str, Any]) -> Evaluation:
        """Read a run's record."""
        numbers = (record.get(key) for key in ("epoch", "score", "accuracy", "loss"))
        epoch, score, accuracy, loss = (float("nan") if n is None else float(n) for n in numbers)
        when = float(record.get("time") or time.time())
        return cls(int(record["step"]), epoch, score, accuracy, loss, when)


@dataclass
class TrialRecord:
    """One trial."""

    name: str
    values: Values
    seed: int
    state: State = "waiting"
    why: str = ""  # it was stopped, or failed
    begun: float = 0.0  # seconds since 1970
    ended: float | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # that its workers were at it, over all attempts
    step: int = 0  # as last heard of
    total_steps: int | None = None

    @property
    def best(self) -> Evaluation | None:
        """Its best evaluation; a run keeps the weights of that one."""
        known = [e for e in self.evaluations if e.score == e.score]  # not NaN
        return max(known, key=lambda e: e.score, default=None)

    @property
    def score(self) -> float:
        """The best score, by which trials are ranked; minus infinity where there is none."""
        return float("-inf") if self.best is None or self.state == "failed" else self.best.score

    @property
    def epoch(self) -> float:
        """The epochs that it was trained for, as of its last evaluation."""
        return self.evaluations[-1].epoch if self.evaluations else 0.0

    def as_json(self) -> dict[str, Any]:
        """All that is known of it, for the report and for `--json`."""
        return {
            "trial": self.name,
            "state": self.state,
            "why": self.why,
            "values": self.values,
            "seed": self.seed,
            "score": None if self.best is None else self.best.score,
            "accuracy": None if self.best is None else self.best.accuracy,
            "loss": None if self.best is None else self.best.loss,
            "epoch": self.epoch,
            "begun": self.begun,
            "ended": self.ended,
            "seconds": round(self.seconds, 1),
            "evaluations": [[e.epoch, e.score, e.accuracy, e.time] for e in self.evaluations],
            "exchanges": self.exchanges,
        }


class TrialStore:
    """The trials in a folder."""

    def __init__(self, folder: Folder) -> None:
        """Open the folder that the trials' folders are in."""
        self.folder = folder

    def entries(self) -> list[TrialRecord]:
        """Read all trials, in the order of their names."""
        return [
            self._read(name)
            for name in self.folder.names()
            if (self.folder / name).exists(TRIAL)
        ]  # fmt: skip

    def open(self, name: str, values: Values, seed: int) -> TrialRecord:
        """Write down a trial that is about to begin."""
        entry = TrialRecord(name, values, seed, begun=round(time.time(), 3))
        write_trial(self.run(name), values, seed, entry.begun, [])
        return entry

    def close(self, entry: TrialRecord, state: State, why: str = "") -> None:
        """Write down how a trial ended."""
        entry.state, entry.why = state, why
        entry.ended = round(time.time(), 3)
        self.run(entry.name).write_json(OUTCOME, {"state": state, "why": why, "ended": entry.ended})

    def reopen(self, entry: TrialRecord) -> None:
        """Forget how a trial ended: it goes on from its checkpoints, if it has some."""
        self.run(entry.name).delete(OUTCOME)
        entry.state, entry.why, entry.ended = "waiting", "", None

    def refresh(self, entry: TrialRecord) -> None:
        """Read again what a trial's workers have written of it."""
        found = self._read(entry.name)
        entry.values, entry.exchanges = found.values, found.exchanges
        entry.evaluations, entry.seconds = found.evaluations, found.seconds

    def run(self, name: str) -> Folder:
        """A trial's folder."""
        return self.folder / name

    def _read(self, name: str) -> TrialRecord:
        run = self.run(name)
        trial = run.read_json(TRIAL)
        entry = TrialRecord(
            name,
            trial["values"],
            int(trial["seed"]),
            begun=float(trial["begun"]),
            exchanges=trial["exchanges"],
        )
        # What a trial was worth before it took over another's weights is gone with its own.
        since = entry.exchanges[-1]["step"] if entry.exchanges else -1
        records = [r for r in read_metrics(run) if r["kind"] == "eval" and r["step"] > since]
        entry.evaluations = [Evaluation.of(record) for record in records]
        entry.seconds = spent(run)
        if run.exists(OUTCOME):
            outcome = run.read_json(OUTCOME)
            entry.state, entry.why = outcome["state"], outcome["why"]
            entry.ended = outcome["ended"]
        elif run.exists(RESULT):  # the driver was killed before it heard of this
            entry.state = "finished"
            entry.ended = entry.evaluations[-1].time if entry.evaluations else None
        return entry


def write_trial(
    run: Folder, values: Values, seed: int, begun: float, exchanges: list[dict[str, Any]]
) -> None:
    """Write what a trial is: its values as they are now, and whose it took over."""
    run.write_json(TRIAL, {"values": values, "seed": seed, "begun": begun, "exchanges": exchanges})


def spent(run: Folder) -> float:
    """The seconds that a run's attempts took, from each one's first line to its last."""
    total = 0.0
    for name in (run / SEGMENTS).names():
        times = [r["time"] for r in parse_lines((run / SEGMENTS).read_text(name)) if "time" in r]
        total += max(times) - min(times) if times else 0.0
    return total


def ranked(entries: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The trials that have a score, the best one first; of equals the older one."""
    known = [entry for entry in entries if entry.score != float("-inf")]
    return sorted(known, key=lambda entry: (-entry.score, entry.name))


def count_states(entries: Iterable[TrialRecord]) -> dict[str, int]:
    """How many trials ended how."""
    counts = dict.fromkeys(ENDED, 0)
    for entry in entries:
        counts[entry.state] = counts.get(entry.state, 0) + 1
    return counts
