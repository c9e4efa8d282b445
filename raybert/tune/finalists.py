"""Who wins: the best few trials and the configured values, each run again with several seeds.

A search's best score is the best of many, and flatters its trial: the more trials, the more. So the
finalists are trained anew, with seeds that the search did not use, and what counts is the mean. The
best of a few means still flatters, so the configured values stay unless the best one is above them
by more than a standard error, of the seeds and of so many validation texts (Breiman et al.,
Classification and Regression Trees, 1984, 3.4.3: the simplest within one standard error).
Everything here is of validation texts; the test texts are not looked at before the winner is known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raybert.errors import RaybertError
from raybert.tune.space import Values
from raybert.tune.trial_store import TrialRecord, ranked

DEFAULT = "0000"  # the trial of the configured values
CONFIGURED = "configured"  # these values, where that trial has taken over another's meanwhile


@dataclass(frozen=True)
class Finalist:
    """A trial, and its runs with other seeds."""

    trial: TrialRecord
    runs: list[TrialRecord]

    @property
    def is_configured(self) -> bool:
        """Whether its values are the configured ones."""
        return self.trial.name == CONFIGURED or (
            self.trial.name == DEFAULT and not self.trial.exchanges
        )

    @property
    def scores(self) -> list[float]:
        """The scores of its runs."""
        return [run.score for run in self.runs if run.score != -math.inf]

    @property
    def mean(self) -> float:
        """The mean score; minus infinity where no run has one."""
        return statistics.fmean(self.scores) if self.scores else -math.inf

    def best_run(self) -> TrialRecord:
        """The run whose model is kept."""
        return ranked(self.runs)[0]

    def as_json(self) -> dict[str, Any]:
        """The configuration, what the search saw of it, and its runs: means and spreads."""
        trial = self.trial
        return {
            "trial": trial.name,
            "configured": self.is_configured,
            "config": trial.values,
            "score": None if trial.best is None else trial.best.score,
            "accuracy": None if trial.best is None else trial.best.accuracy,
            "seeds": {
                "n": len(self.scores),
                "score": _spread(self.scores),
                "accuracy": _spread([run.best.accuracy for run in self.runs if run.best]),
                "loss": _spread([run.best.loss for run in self.runs if run.best]),
                "failed": [run.why for run in self.runs if run.state == "failed"],
            },
        }


def finalists_of(entries: Sequence[TrialRecord], most: int) -> list[TrialRecord]:
    """The best trials of different values, and the configured values whatever they scored.

    Raises:
        RaybertError: no trial has a score.
    """
    chosen: list[TrialRecord] = []
    order = ranked(entries)
    if not order:
        why = next((e.why for e in entries if e.state == "failed"), "none was evaluated")
        raise RaybertError(f"no trial came to a score: {why}")
    for entry in order:
        if len(chosen) < most and all(entry.values != other.values for other in chosen):
            chosen.append(entry)
    default = configured(entries)
    if default is not None and all(default.values != other.values for other in chosen):
        chosen.append(default)
    return chosen


def configured(entries: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial of the configured values.

    One that took over another trial's weights has that one's values, changed, from then on: the
    configured ones are then nobody's, and run for the first time among the finalists.
    """
    first = next((entry for entry in entries if entry.name == DEFAULT), None)
    if first is None or not first.exchanges:
        return first
    return TrialRecord(CONFIGURED, first.exchanges[0]["before"], first.seed, begun=first.begun)


def runs_of(
    finalists: Sequence[TrialRecord], seed: int, seeds: int
) -> list[tuple[str, Values, int]]:
    """The runs of all finalists: name, values, seed; first seeds of all, then second ones."""
    return [
        (f"{finalist.name}-s{number}", finalist.values, seed + number)
        for number in range(1, seeds + 1)
        for finalist in finalists
    ]


def gathered(
    finalists: Sequence[TrialRecord], runs: Sequence[TrialRecord], texts: int
) -> list[Finalist]:
    """The finalists with their runs, the winner first, then by their means; of equals the older.

    Args:
        finalists: the trials.
        runs: of all of them, with other seeds.
        texts: how many validation texts the scores are of.

    Raises:
        RaybertError: no run has a score.
    """
    found = [
        Finalist(trial, [run for run in runs if run.name.startswith(f"{trial.name}-s")])
        for trial in finalists
    ]
    if all(not finalist.scores for finalist in found):
        why = next((run.why for run in runs if run.why), "none was evaluated")
        raise RaybertError(f"no finalist came to a score: {why}")
    order = sorted(found, key=lambda finalist: (-finalist.mean, finalist.trial.name))
    default = next((finalist for finalist in order if finalist.is_configured), None)
    if default is not None and not is_above(order[0], default, texts):
        order.remove(default)
        order.insert(0, default)
    return order


def is_above(finalist: Finalist, default: Finalist, texts: int) -> bool:
    """Whether a finalist is better than the configured values by more than chance gives it.

    Chance has two parts: the seeds, compared in pairs, for the runs of one seed share the order of
    the texts; and the validation texts, on which an accuracy p has the variance p (1 - p) / texts,
    however many seeds agree.
    """
    if not default.scores or not finalist.scores:
        return bool(finalist.scores)
    theirs = {run.seed: run.score for run in default.runs if run.score != -math.inf}
    gains = [
        run.score - theirs[run.seed]
        for run in finalist.runs
        if run.score != -math.inf and run.seed in theirs
    ]
    if not gains:
        return finalist.mean > default.mean
    accuracy = min(1.0, max(0.0, default.mean))
    of_texts = accuracy * (1 - accuracy) / max(1, texts)
    of_seeds = statistics.variance(gains) / len(gains) if len(gains) > 1 else 0.0
    return statistics.fmean(gains) > math.sqrt(of_seeds + of_texts)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }
