"""What a classifier is worth on labelled rows: accuracy, loss, F1, confusion, calibration.

Everything is computed from the logits of all rows at once, never as a mean of per-batch means, so
neither the batch size nor the number of workers can show in a score.

Legend: n rows, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.errors import DataError, RaybertError

NUM_BINS = 15  # of the calibration error, as in arXiv 1706.04599, section 5


def classification_scores(
    logits: npt.ArrayLike, labels: npt.ArrayLike, label_names: Sequence[str]
) -> dict[str, Any]:
    """Score predictions against the truth; the result holds plain Python values, ready for JSON.

    Undefined ratios (the precision of a label that is never predicted, the recall of one that never
    occurs) are 0. `f1_macro` averages over the labels that occur or are predicted: one that does
    neither says nothing about the classifier.

    Args:
        logits: [n, L] float, finite; a row's prediction is its first maximum.
        labels: [n] int, indices into `label_names`.
        label_names: the L names.

    Returns:
        n: rows scored.
        accuracy: the share of rows whose prediction is the label.
        loss: mean cross-entropy in nats.
        f1_macro, per_class: `{name: {precision, recall, f1, support}}`.
        label_names, confusion: L x L counts, rows are true labels, columns are predictions.
        expected_calibration_error, bins: see `calibration`.

    Raises:
        DataError: there is no row, or a label lies outside the names.
        RaybertError: a logit is not finite.
        ValueError: the shapes do not fit.
    """
    scores = np.asarray(logits, dtype=np.float64)  # [n, L]
    truth = np.asarray(labels)  # [n]
    _check(scores, truth, label_names)
    n, num_labels = scores.shape

    log_probabilities = _log_softmax(scores)  # [n, L]
    predicted = scores.argmax(axis=1)  # [n]
    rows = np.arange(n)
    correct = predicted == truth  # [n]
    confidence = np.exp(log_probabilities[rows, predicted])  # [n]

    pairs = np.bincount(truth * num_labels + predicted, minlength=num_labels**2)
    confusion = pairs.reshape(num_labels, num_labels)  # [L, L]
    hits, support, guesses = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = _ratio(hits, guesses), _ratio(hits, support)
    f1 = _ratio(2 * hits, support + guesses)  # 2TP / (2TP + FP + FN)
    calibration_error, bins = calibration(confidence, correct)
    return {
        "n": n,
        "accuracy": float(correct.mean()),
        "loss": float(-log_probabilities[rows, truth].mean()),
        "f1_macro": float(f1[support + guesses > 0].mean()),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(label_names)
        },
        "label_names": list(label_names),
        "confusion": confusion.tolist(),
        "expected_calibration_error": calibration_error,
        "bins": bins,
    }


def calibration(
    confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]
) -> tuple[float, list[dict[str, Any]]]:
    """Compare how sure a classifier is with how often it is right (arXiv 1706.04599, eq. 3).

    Args:
        confidence: [n] the probability of each row's prediction, in (0, 1].
        correct: [n] whether the prediction is right.

    Returns:
        The expected calibration error, sum over bins of count/n * |accuracy - confidence|, and the
        bins of the reliability diagram: `{lower, upper, count, confidence, accuracy}` over
        (lower, upper], the two means None where a bin is empty.
    """
    # The bins are open below: a confidence of exactly 0.2 belongs to (0.133, 0.2].
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


def _check(
    scores: npt.NDArray[np.float64], truth: npt.NDArray[Any], label_names: Sequence[str]
) -> None:
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
    if not np.isfinite(scores).all():
        row = int((~np.isfinite(scores)).any(axis=1).argmax())
        raise RaybertError(
            f"the logits of row {row} are not finite: {scores[row].tolist()}; the weights have "
            "diverged, train again with a lower lr"
        )


def _log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities, [n, L]; shifted so that large logits do not overflow."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    normalized: npt.NDArray[np.float64] = shifted - np.log(
        np.exp(shifted).sum(axis=1, keepdims=True)
    )
    return normalized


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Elementwise part / whole, 0 where the whole is 0."""
    ratio = np.zeros(len(whole))
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio
