"""Metrics of a single-label classifier: accuracy, loss, F1, confusion matrix, calibration.

Scores are computed from the logits of all rows at once, so they depend neither on the batch size
nor on the number of workers.

scikit-learn computes what it can. It has neither an expected calibration error nor the counts of a
reliability diagram's bins, its `log_loss` clips probabilities at 2e-16, which bounds the loss of a
wrong and confident prediction, and its temperature scaling has no smoothed targets.

Shapes: n rows, L labels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raybert.errors import DataError, RaybertError

RANGE = (0.25, 10.0)  # of temperatures; one beyond it means broken labels or logits
_BISECTIONS = 50
MAX_MATRIX = 200  # labels of a confusion matrix; of more, the most frequent confusions
_MAX_CELLS = 1 << 24  # of logits that are computed with at once, in 64 bits
NUM_BINS = 15  # of the calibration error, as in arXiv 1706.04599, section 5
_F64 = npt.NDArray[np.float64]


def classification_scores(
    logits: npt.ArrayLike, labels: npt.ArrayLike, label_names: Sequence[str]
) -> dict[str, Any]:
    """Score predictions against the labels; the result contains plain Python values, for JSON.

    Undefined ratios (the precision of a label that is never predicted, the recall and F1 of one
    that never occurs) are NaN. `f1_macro` averages over the labels that occur or are predicted; an
    undefined F1 counts as 0.

    Logits [n, L], finite; labels [n], indices into the L names. A prediction is the first maximum.

    Returns:
        n: rows scored.
        accuracy: the share of rows whose prediction is the label.
        loss: mean cross-entropy in nats.
        f1_macro, per_class: `{name: {precision, recall, f1, support}}`.
        label_names, confusion: L x L counts; rows are labels, columns are predictions. Of more than
        MAX_MATRIX labels, `confusions` instead: the most frequent [label, predicted, count].
        expected_calibration_error, bins: see `calibration`.

    Raises:
        DataError: there is no row, or a label lies outside the names.
        RaybertError: a logit is not finite.
        ValueError: the shapes do not fit.
    """
    scores = np.asarray(logits)  # [n, L]
    truth = np.asarray(labels)  # [n]
    _check(scores, truth, label_names)
    # Imported here: it takes 1.5 s of CPU and 73 MiB, which replicas of the server do without.
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    indices = np.arange(len(label_names))
    predicted, log_p_label, log_p_predicted = _decide(scores, truth)  # [n] each
    correct = predicted == truth  # [n]
    confidence = np.exp(log_p_predicted)  # [n]
    precision, recall, f1, support = precision_recall_fscore_support(  # [L] each
        truth, predicted, labels=indices, zero_division=np.nan
    )
    calibration_error, bins = calibration(confidence, correct)
    return {
        "n": len(truth),
        "accuracy": float(correct.mean()),
        "loss": float(-log_p_label.mean()),
        "f1_macro": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]) if support[i] else math.nan,
                "support": int(support[i]),
            }
            for i, name in enumerate(label_names)
        },
        "label_names": list(label_names),
        **_confusion(truth, predicted, len(label_names)),
        "expected_calibration_error": calibration_error,
        "bins": bins,
    }


def _decide(
    scores: npt.NDArray[Any], truth: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], _F64, _F64]:
    """The prediction of each row, and the logarithms of the label's and its probability, [n]."""
    n, num_labels = scores.shape
    parts = []
    size = max(1, _MAX_CELLS // num_labels)
    for begin in range(0, n, size):
        some = np.asarray(scores[begin : begin + size], np.float64)
        log_p: _F64 = torch.tensor(some).log_softmax(dim=1).numpy()  # [rows, L]
        predicted, rows = some.argmax(axis=1), np.arange(len(some))
        parts.append((predicted, log_p[rows, truth[begin : begin + size]], log_p[rows, predicted]))
    first, second, third = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return first, second, third


def _confusion(
    truth: npt.NDArray[Any], predicted: npt.NDArray[np.int64], num_labels: int
) -> dict[str, Any]:
    """The confusion matrix, or of many labels the most frequent confusions."""
    if num_labels <= MAX_MATRIX:
        from sklearn.metrics import confusion_matrix

        with warnings.catch_warnings():  # it warns of a single label, although `labels` is given
            warnings.simplefilter("ignore", UserWarning)
            matrix = confusion_matrix(truth, predicted, labels=np.arange(num_labels))
        return {"confusion": matrix.tolist()}
    is_wrong = truth != predicted
    pairs, counts = np.unique(
        np.stack([truth[is_wrong], predicted[is_wrong]], axis=1), axis=0, return_counts=True
    )
    most = np.argsort(-counts, kind="stable")[:MAX_MATRIX]
    return {"confusions": np.column_stack([pairs[most], counts[most]]).tolist()}


def calibration(
    confidence: _F64, correct: npt.NDArray[np.bool_]
) -> tuple[float, list[dict[str, Any]]]:
    """The expected calibration error and its bins (arXiv 1706.04599, equation 3).

    From the probability of each row's prediction, (0, 1], and whether it is the label, [n] both.
    Returns the sum over bins of count/n * |accuracy - confidence|, and the bins of the reliability
    diagram, `{lower, upper, count, confidence, accuracy}` for confidences in (lower, upper]; the
    two means are None if a bin is empty.
    """
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, NUM_BINS - 1)  # [n]
    count = np.bincount(index, minlength=NUM_BINS)
    confidence_sum = np.bincount(index, weights=confidence, minlength=NUM_BINS)
    correct_sum = np.bincount(index, weights=correct, minlength=NUM_BINS)
    error = np.abs(correct_sum - confidence_sum).sum() / len(confidence)
    bins = [
        {
            "lower": float(edges[i]),
            "upper": float(edges[i + 1]),
            "count": int(count[i]),
            "confidence": float(confidence_sum[i] / count[i]) if count[i] else None,
            "accuracy": float(correct_sum[i] / count[i]) if count[i] else None,
        }
        for i in range(NUM_BINS)
    ]
    return float(error), bins


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Find the divisor of the logits that maximises the likelihood (arXiv 1706.04599, 4.2).

    It calibrates the probabilities and changes no prediction. Targets are smoothed as by Platt
    (1999): the label's is (n + 1) / (n + L), each other one 1 / (n + L). Without that, a model that
    makes no mistake on n rows would get the lowest temperature. Finite logits [n, L] and labels [n]
    -> the temperature, within RANGE; 1.0 if n is 0.
    """
    found, truth = np.asarray(logits), np.asarray(labels)
    n, num_labels = found.shape
    if n * num_labels > _MAX_CELLS:  # some evenly spaced rows: each bisection computes them all
        n = max(1, _MAX_CELLS // 8 // num_labels)
        chosen = np.arange(n) * len(truth) // n
        found, truth = found[chosen], truth[chosen]
    if not n:
        return 1.0
    scores = np.asarray(found, np.float64)
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


def _check(scores: npt.NDArray[Any], truth: npt.NDArray[Any], label_names: Sequence[str]) -> None:
    if scores.ndim != 2 or scores.shape[1] != len(label_names):
        raise ValueError(
            f"logits of shape {scores.shape} do not fit {len(label_names)} label names"
        )
    if len(set(label_names)) != len(label_names):
        raise ValueError(f"label names must differ from each other: {list(label_names)}")
    if truth.shape != scores.shape[:1]:
        raise ValueError(f"labels of shape {truth.shape} do not fit logits of shape {scores.shape}")
    if not len(truth):
        raise DataError("there are no rows to score; check the split and its filters")
    if not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {truth.dtype}")
    outside = (truth < 0) | (truth >= len(label_names))
    if outside.any():
        row = int(outside.argmax())
        raise DataError(
            f"row {row} has label {int(truth[row])}, but the model knows {len(label_names)} labels "
            f"(0 to {len(label_names) - 1}); score it on data with the labels it was trained on"
        )
    # Not all at once: of many labels that would be a second matrix.
    broken = next((row for row, logits in enumerate(scores) if not np.isfinite(logits).all()), None)
    if broken is not None:
        row = broken
        raise RaybertError(
            f"the logits of row {row} are not finite: {scores[row].tolist()}; the weights have "
            "diverged, train again with a lower lr"
        )
