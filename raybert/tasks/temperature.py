"""How much too sure a classifier is: one number that its logits are divided by.

Fitted on the texts that the model was chosen by (Guo et al., arXiv 1706.04599, section 4.2). It
moves no prediction, only how sure each one is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RANGE = (0.25, 10.0)  # what a temperature may be; beyond, the labels or the logits are broken
_HALVINGS = 50


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Find the temperature under which labelled rows are likeliest.

    Labels count as Platt (1999) has it for few rows: the right one as (n + 1) / (n + L) and each
    other as 1 / (n + L), so that a model without a mistake is not taken for one that never errs.

    Args:
        logits: [n, L] float, finite.
        labels: [n] int.

    Returns:
        The temperature, within RANGE; 1.0 where there is no row.
    """
    scores = np.asarray(logits, np.float64)
    truth = np.asarray(labels)
    n, num_labels = scores.shape
    if not n:
        return 1.0
    targets = np.full(scores.shape, 1 / (n + num_labels))
    targets[np.arange(n), truth] = (n + 1) / (n + num_labels)
    wanted = (targets * scores).sum()
    # The likelihood is concave in the inverse of the temperature: its slope has one zero.
    low, high = 1 / RANGE[1], 1 / RANGE[0]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        scaled = middle * scores
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        expected = (weights / weights.sum(axis=1, keepdims=True) * scores).sum()
        low, high = (middle, high) if wanted > expected else (low, middle)
    return float(2 / (low + high))
