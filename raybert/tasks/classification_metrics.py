"""Metrics of a single-label classifier: accuracy, loss, F1, confusion matrix, calibration.

Everything is computed from the logits of all rows at once, never as a mean of per-batch means, so
the scores depend neither on the batch size nor on the number of workers.

scikit-learn computes what it can. It has neither an expected calibration error nor the counts of a
reliability diagram's bins, and its `log_loss` clips probabilities at 2e-16, which bounds the loss
of a wrong and confident prediction.

Shapes: n rows, L labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raybert.errors import DataError, RaybertError

NUM_BINS = 15  # of the calibration error, as in arXiv 1706.04599, section 5
_F64 = npt.NDArray[np.float64]


def classification_scores(
    logits: npt.ArrayLike, labels: npt.ArrayLike, label_names: Sequence[str]
) -> dict[str, Any]:
    """Score predictions against the labels; the result contains plain Python values, for JSON.

    Undefined ratios (the precision of a label that is never predicted, the recall of one that never
    occurs) are 0. `f1_macro` averages over the labels that occur or are predicted.

    Args:
        logits: [n, L] float, finite; a row's prediction is its first maximum.
        labels: [n] int, indices into `label_names`.
        label_names: the L names.

    Returns:
        n: rows scored.
        accuracy: the share of rows whose prediction is the label.
        loss: mean cross-entropy in nats.
        f1_macro, per_class: `{name: {precision, recall, f1, support}}`.
        label_names, confusion: L x L counts; rows are labels, columns are predictions.
        expected_calibration_error, bins: see `calibration`.

    Raises:
        DataError: there is no row, or a label lies outside the names.
        RaybertError: a logit is not finite.
        ValueError: the shapes do not fit.
    """
    scores = np.asarray(logits, dtype=np.float64)  # [n, L]
    truth = np.asarray(labels)  # [n]
    _check(scores, truth, label_names)
    # Imported here: it takes 1.5 s of CPU and 73 MiB, which replicas of the server do without.
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    log_probabilities: _F64 = torch.tensor(scores).log_softmax(dim=1).numpy()  # [n, L]
    predicted = scores.argmax(axis=1)  # [n]
    rows, indices = np.arange(len(truth)), np.arange(len(label_names))
    correct = predicted == truth  # [n]
    confidence = np.exp(log_probabilities[rows, predicted])  # [n]
    precision, recall, f1, support = precision_recall_fscore_support(  # [L] each
        truth, predicted, labels=indices, zero_division=0.0
    )
    with warnings.catch_warnings():  # it warns of a single label, although `labels` is given
        warnings.simplefilter("ignore", UserWarning)
        confusion = confusion_matrix(truth, predicted, labels=indices)  # [L, L]
    calibration_error, bins = calibration(confidence, correct)
    return {
        "n": len(truth),
        "accuracy": float(correct.mean()),
        "loss": float(-log_probabilities[rows, truth].mean()),
        "f1_macro": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
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
    confidence: _F64, correct: npt.NDArray[np.bool_]
) -> tuple[float, list[dict[str, Any]]]:
    """The expected calibration error and its bins (arXiv 1706.04599, equation 3).

    Args:
        confidence: [n] the probability of each row's prediction, in (0, 1].
        correct: [n] whether the prediction is the label.

    Returns:
        The sum over bins of count/n * |accuracy - confidence|, and the bins of the reliability
        diagram: `{lower, upper, count, confidence, accuracy}` for confidences in (lower, upper];
        the two means are None where a bin is empty.
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


def _check(scores: _F64, truth: npt.NDArray[Any], label_names: Sequence[str]) -> None:
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
