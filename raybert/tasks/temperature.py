"""Temperature scaling: calibrate a classifier by one divisor of its logits.

Fitted on the validation texts (Guo et al., arXiv 1706.04599, section 4.2). It changes the
probabilities and no prediction. scikit-learn's temperature scaling has no smoothed targets, with
which a model without mistakes on few texts stays calibrated.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RANGE = (0.25, 10.0)  # of temperatures; one beyond it means broken labels or logits
_BISECTIONS = 50


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Find the temperature that maximises the likelihood of labelled rows.

    Targets are smoothed as by Platt (1999): the label's is (n + 1) / (n + L), each other one
    1 / (n + L). Without that, a model that makes no mistake on n rows would get the lowest
    temperature. Finite logits [n, L] and labels [n] -> the temperature, within RANGE; 1.0 where n
    is 0.
    """
    scores = np.asarray(logits, np.float64)
    truth = np.asarray(labels)
    n, num_labels = scores.shape
    if not n:
        return 1.0
    targets = np.full(scores.shape, 1 / (n + num_labels))
    targets[np.arange(n), truth] = (n + 1) / (n + num_labels)
    target_sum = (targets * scores).sum()
    # The log-likelihood is concave in the inverse temperature, so its derivative has one zero.
    low, high = 1 / RANGE[1], 1 / RANGE[0]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        scaled = middle * scores
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        expected = (weights / weights.sum(axis=1, keepdims=True) * scores).sum()
        low, high = (middle, high) if target_sum > expected else (low, middle)
    return float(2 / (low + high))
