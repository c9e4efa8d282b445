"""One of L classes, of a text or of a token: its loss, probabilities, divergence and scores.

Shapes: L classes; logits have any dimensions before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.records import format_mean
from raybert.tasks.protocol import F32, NO_LABEL, Loss, LossSettings, Metrics, TableData

_MIN_PROBABILITY = 1e-7  # for its logarithm


def cross_entropy(config: LossSettings, labels: npt.NDArray[np.int64], num_classes: int) -> Loss:
    """The loss against integer targets; `labels` are all those of the training texts, [n]."""
    weights = _class_weights(config, labels, num_classes)
    gamma, smoothing = config.focal_gamma, config.label_smoothing

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        x, y = logits.flatten(0, -2), targets.flatten()  # [rows, L], [rows]
        each_or_sum = F.cross_entropy(
            x,
            y,
            weight=None if weights is None else weights.to(x.device),
            ignore_index=NO_LABEL,
            reduction="none" if gamma else "sum",
            label_smoothing=smoothing,
        )
        if not gamma:
            return each_or_sum
        p = x.softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0]
        return ((1 - p) ** gamma * each_or_sum).sum()  # arXiv 1708.02002

    return loss


def _class_weights(
    config: LossSettings, labels: npt.NDArray[np.int64], num_classes: int
) -> Tensor | None:
    """Weights of the classes in the loss, fp32 [L]; balanced: inversely to their frequency."""
    if config.class_weights is None:
        return None
    if config.class_weights == "balanced":
        labels = labels[labels != NO_LABEL]
        counts = np.bincount(labels, minlength=num_classes)  # [L]
        weights = len(labels) / (num_classes * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32)
    return torch.tensor(config.class_weights, dtype=torch.float32)


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """The Kullback-Leibler divergence between logits [..., L], in nats: [...]."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def softmax(logits: F32) -> F32:
    """The probabilities of logits [..., L]."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), np.float32)


def ranking(scores: F32) -> list[int]:
    """Indices of scores [L], the highest first; of equal ones the first.

    In Python: np.argsort releases the GIL, and a server's event loop then waits for it.
    """
    values = scores.tolist()
    return sorted(range(len(values)), key=values.__getitem__, reverse=True)


def mean_logits(outputs: Sequence[F32]) -> F32:
    """The logits of the mean probability of several models, from the logits of each."""
    mean = np.mean([softmax(each) for each in outputs], axis=0)
    return np.asarray(np.log(np.maximum(mean, _MIN_PROBABILITY)), np.float32)


def class_table(title: str, head: str, counted: str, metrics: Metrics) -> TableData:
    """A table of `per_class`: precision, recall, F1 and support; `head`, `counted`: its columns."""
    ratios = ("precision", "recall", "f1")
    rows = [
        [name, *(format_mean(found[ratio]) for ratio in ratios), f"{found['support']:,}"]
        for name, found in metrics.get("per_class", {}).items()
    ]
    return TableData(title, [head, *ratios, counted], rows)
