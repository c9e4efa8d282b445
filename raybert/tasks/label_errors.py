"""Labels of held-out texts that are probably wrong, by confident learning.

Northcutt, Jiang and Chuang, arXiv 1911.00068, section 3: a class's threshold is the mean
probability that texts with its label have of it. A text counts as mislabelled if, of the classes
whose thresholds it reaches, another one than its label is the most probable: these are the entries
beside the diagonal of the confident joint, as of cleanlab's `filter_by="confident_learning"`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class LikelyError(NamedTuple):
    """A text whose label is probably wrong."""

    row: int
    suggested: int  # the class that it probably has
    probability: float  # of that class
    of_label: float  # the probability of its label


def likely_errors(
    probabilities: npt.NDArray[Any], labels: npt.NDArray[np.int64]
) -> list[LikelyError]:
    """The likely errors among labels [n], the least probable label first.

    Probabilities [n, L] are those of a model that has not seen these texts.
    """
    rows = np.arange(len(labels))
    own = probabilities[rows, labels]
    count = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, weights=own, minlength=probabilities.shape[1])
    # No text has a label that is nobody's.
    thresholds = np.where(count > 0, sums / np.maximum(count, 1), np.inf)
    reached = np.where(probabilities >= thresholds - 1e-9, probabilities, -1.0)
    suggested = reached.argmax(axis=1)
    wrong = np.flatnonzero((reached.max(axis=1) >= 0) & (suggested != labels))
    order = wrong[np.argsort(own[wrong], kind="stable")]
    return [
        LikelyError(int(r), int(suggested[r]), float(probabilities[r, suggested[r]]), float(own[r]))
        for r in order
    ]
