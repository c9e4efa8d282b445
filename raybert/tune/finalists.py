"""Choose the winner: run the best trials and the configured values again with several seeds.

The best score of a search is a maximum over many trials, and biased upwards with their number. So
the finalists are trained again with seeds that the search did not use, and are compared by their
means. The best mean is still biased, so the configured values win unless another finalist is better
by more than one standard error of the seeds and the validation texts (Breiman et al.,
Classification and Regression Trees, 1984, 3.4.3: the simplest model within one standard error).
All scores are of validation texts; the test texts are not used before the winner is chosen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raybert.errors import RaybertError
from raybert.tune.space import Values
from raybert.tune.trial_store import TrialRecord, rank_trials

DEFAULT = "0000"  # the trial of the configured values
CONFIGURED = "configured"  # the finalist with these values, if that trial has exploited another


@dataclass(frozen=True)
class Finalist:
    """A trial, and its runs with other seeds."""

    trial: TrialRecord
    runs: list[TrialRecord]

    @property
    def is_configured(self) -> bool:
        """Whether its values are the configured ones."""
        return self.trial.name == CONFIGURED or (
            self.trial.name == DEFAULT and not self.trial.exploits
        )

    @property
    def scores(self) -> list[float]:
        """The scores of its runs."""
        return [run.score for run in self.runs if run.score != -math.inf]

    @property
    def mean(self) -> float:
        """The mean score; minus infinity if no run has one."""
        return statistics.fmean(self.scores) if self.scores else -math.inf

    def best_run(self) -> TrialRecord:
        """The run whose model is kept."""
        return rank_trials(self.runs)[0]

    def as_json(self, metric: str) -> dict[str, Any]:
        """The values, their result in the search, and means and deviations over the runs.

        `metric` is that of the search.
        """
        trial = self.trial
        return {
            "trial": trial.name,
            "configured": self.is_configured,
            "config": trial.values,
            "score": None if trial.best is None else trial.best.score,
            "metric": metric,
            metric: None if trial.best is None else trial.best.value,
            "seeds": {
                "n": len(self.scores),
                "score": _spread(self.scores),
                metric: _spread([run.best.value for run in self.runs if run.best]),
                "loss": _spread([run.best.loss for run in self.runs if run.best]),
                "failed": [run.reason for run in self.runs if run.state == "failed"],
            },
        }


def choose_finalists(trials: Sequence[TrialRecord], count: int) -> list[TrialRecord]:
    """The best `count` trials of different values, and the configured values in any case."""
    chosen: list[TrialRecord] = []
    ranking = rank_trials(trials)
    if not ranking:
        reason = next((t.reason for t in trials if t.state == "failed"), "none was evaluated")
        raise RaybertError(f"no trial has a score: {reason}")
    for trial in ranking:
        if len(chosen) < count and all(trial.values != other.values for other in chosen):
            chosen.append(trial)
    default = configured_trial(trials)
    if default is not None and all(default.values != other.values for other in chosen):
        chosen.append(default)
    return chosen


def configured_trial(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial of the configured values.

    After a PBT exploit that trial has other values: then the configured ones get a record of their
    own, without results, and are trained to the end only as a finalist.
    """
    first = next((trial for trial in trials if trial.name == DEFAULT), None)
    if first is None or not first.exploits:
        return first
    values = first.exploits[0]["before"]
    return TrialRecord(CONFIGURED, values, first.seed, started=first.started)


def finalist_runs(
    finalists: Sequence[TrialRecord], seed: int, seeds: int
) -> list[tuple[str, Values, int]]:
    """The runs of all finalists, seed by seed: the name, the values and the seed of each."""
    return [
        (f"{finalist.name}-s{number}", finalist.values, seed + number)
        for number in range(1, seeds + 1)
        for finalist in finalists
    ]


def rank_finalists(
    finalists: Sequence[TrialRecord], runs: Sequence[TrialRecord], texts: int
) -> list[Finalist]:
    """The finalists, the winner first, then by their means; `texts` were validated on."""
    found = [
        Finalist(trial, [run for run in runs if run.name.startswith(f"{trial.name}-s")])
        for trial in finalists
    ]
    if all(not finalist.scores for finalist in found):
        reason = next((run.reason for run in runs if run.reason), "none was evaluated")
        raise RaybertError(f"no finalist has a score: {reason}")
    ranking = sorted(found, key=lambda finalist: (-finalist.mean, finalist.trial.name))
    default = next((finalist for finalist in ranking if finalist.is_configured), None)
    if default is not None and not is_better(ranking[0], default, texts):
        ranking.remove(default)
        ranking.insert(0, default)
    return ranking


def is_better(finalist: Finalist, default: Finalist, texts: int) -> bool:
    """Whether a finalist is better than the configured values by more than a standard error.

    The error has two parts. Seeds: the variance of the paired differences, because runs of one
    seed share the order of the texts. Validation texts, which more seeds do not reduce: a share p,
    as accuracy and F1 are, has the variance p (1 - p) / texts, an error e, whose score is -e, that
    of the root of a mean of squares, e² / (2 texts).
    """
    if not default.scores or not finalist.scores:
        return bool(finalist.scores)
    default_scores = {run.seed: run.score for run in default.runs if run.score != -math.inf}
    gains = [
        run.score - default_scores[run.seed]
        for run in finalist.runs
        if run.score != -math.inf and run.seed in default_scores
    ]
    if not gains:
        return finalist.mean > default.mean
    mean = min(1.0, default.mean)
    variance = mean * (1 - mean) if mean >= 0 else mean**2 / 2
    text_variance = variance / max(1, texts)
    seed_variance = statistics.variance(gains) / len(gains) if len(gains) > 1 else 0.0
    return statistics.fmean(gains) > math.sqrt(seed_variance + text_variance)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }
