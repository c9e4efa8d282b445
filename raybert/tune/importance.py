"""What a hyperparameter is worth: the share of the scores' variance that it explains alone.

Of numbers, the square of Spearman's rank correlation; of choices, the correlation ratio of the
ranks (between-group over total variance). It is one number a key from a few dozen trials: it sees
no interactions and no optimum in the middle of a range, and trials that were stopped count with the
best that they reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.tune.space import Space
from raybert.tune.trial_store import TrialRecord, ranked

METHOD = (
    "share of the variance of the scores' ranks that a key explains alone: squared Spearman "
    "correlation for ranges, correlation ratio for choices; fewer than 20 trials say little"
)
_FEWEST = 4  # trials that a share can be taken of


def importance(space: Space, entries: Sequence[TrialRecord]) -> dict[str, float | None]:
    """The share of each key, 0 to 1; None where too few trials, or no two values, tell it."""
    known = ranked(entries)
    found: dict[str, float | None] = {}
    for dimension in space.dimensions:
        there = [e for e in known if dimension.key in e.values]
        values = [e.values[dimension.key] for e in there]
        if len(there) < _FEWEST or len({repr(v) for v in values}) < 2:
            found[dimension.key] = None
            continue
        scores = _ranks(np.array([e.score for e in there]))
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
    """Ranks from 0; equals share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)
