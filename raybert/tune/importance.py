"""Hyperparameter importance: the share of the scores' variance that a key explains alone.

For ranges it is the square of Spearman's rank correlation, for choices the correlation ratio of the
ranks (between-group over total variance). One number per key from a few dozen trials shows neither
interactions nor an optimum inside a range. Stopped trials count with their best score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.tune.space import Space
from raybert.tune.trial_store import TrialRecord, rank_trials

METHOD = (
    "share of the variance of the scores' ranks that a key explains alone: squared Spearman "
    "correlation for ranges, correlation ratio for choices; fewer than 20 trials say little"
)
_MIN_TRIALS = 4


def importance(space: Space, trials: Sequence[TrialRecord]) -> dict[str, float | None]:
    """The share of each key, 0 to 1; None for too few trials or a single value."""
    ranking = rank_trials(trials)
    found: dict[str, float | None] = {}
    for dimension in space.dimensions:
        with_key = [trial for trial in ranking if dimension.key in trial.values]
        values = [trial.values[dimension.key] for trial in with_key]
        if len(with_key) < _MIN_TRIALS or len({repr(v) for v in values}) < 2:
            found[dimension.key] = None
            continue
        scores = _ranks(np.array([trial.score for trial in with_key]))
        if dimension.kind == "choice" or None in values:
            found[dimension.key] = _correlation_ratio([repr(v) for v in values], scores)
        else:
            found[dimension.key] = _squared_correlation(_ranks(np.array(values, float)), scores)
    return found


def _squared_correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float | None:
    if not x.std() or not y.std():
        return None
    return round(float(np.corrcoef(x, y)[0, 1] ** 2), 4)


def _correlation_ratio(groups: Sequence[str], y: npt.NDArray[Any]) -> float | None:
    total = float(((y - y.mean()) ** 2).sum())
    if not total:
        return None
    names = np.array(groups)
    between = sum(
        (names == name).sum() * (y[names == name].mean() - y.mean()) ** 2 for name in set(groups)
    )
    return round(float(between) / total, 4)


def _ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Ranks from 0; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)
