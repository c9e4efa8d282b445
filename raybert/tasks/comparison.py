"""Whether one model is better than another: a paired bootstrap over held-out texts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from raybert.tasks.protocol import Outputs, Targets, TextTask

_RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 20
_FEW_RESAMPLES = 100  # of a metric that has to be computed anew for each


class Predictions(NamedTuple):
    """The outputs of a model for held-out texts, their targets, and the task that reads them."""

    task: TextTask
    outputs: Outputs
    targets: Targets


class Difference(NamedTuple):
    """A metric of the first model minus the second one's, with a 95% interval."""

    value: float
    low: float
    high: float


def paired_difference(
    first: Predictions, second: Predictions, seed: int = 0, metric: str | None = None
) -> Difference:
    """Compare two models on the same texts by a metric, by default the task's.

    The difference is positive where the first model is better, for errors, too. Percentile
    bootstrap: Efron and Tibshirani, 1993.
    """
    usual = first.task.default_metric
    metric = metric or usual
    sign = 1 if first.task.selection_metrics[metric] else -1
    draw = np.random.default_rng(seed)
    parts = [
        m.task.ratio_parts(m.outputs, m.targets) if metric == usual else _loss_parts(m)
        for m in (first, second)
    ]
    if metric not in (usual, "loss") or parts[0] is None or parts[1] is None:
        found = _resampled_metrics(first, second, metric, draw)
    else:
        found = _resampled_ratios(np.stack([parts[0], parts[1]], axis=1), draw)
    low, high = np.nanpercentile(sign * found[1:], [2.5, 97.5])
    return Difference(sign * float(found[0]), float(low), float(high))


def text_losses(task: TextTask, outputs: Any, targets: Any) -> npt.NDArray[np.float64] | None:
    """The log-loss of each text, float64 [n]; None for numbers and tokens."""
    if task.is_per_token or task.output_kind == "number":
        return None
    logits = np.asarray(outputs, np.float64) / float(task.fitted.get("temperature", 1.0))
    if task.output_kind == "class":
        losses = logsumexp(logits, axis=1) - logits[np.arange(len(logits)), targets]
    else:
        losses = (np.logaddexp(0, logits) - (np.asarray(targets) > 0.5) * logits).mean(axis=1)
    return np.asarray(losses, np.float64)


def _loss_parts(model: Predictions) -> npt.NDArray[np.float64] | None:
    losses = text_losses(*model)
    return None if losses is None else np.stack([losses, np.ones_like(losses)], axis=1)


def _resampled_ratios(
    parts: npt.NDArray[np.float64], draw: np.random.Generator
) -> npt.NDArray[np.float64]:
    """The difference of two ratios of sums, of all texts, then of resampled ones.

    `parts`: numerator and denominator of each text by both models, [n, 2, 2].
    """
    count = len(parts)
    even = np.full(count, 1 / count)

    def differences(weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        sums = np.einsum("rn,nmk->rmk", weights, parts)  # [resamples, models, 2]
        ratios = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
        return np.asarray(ratios[:, 0] - ratios[:, 1])

    found = [differences(np.ones((1, count)))]
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        found.append(differences(draw.multinomial(count, even, _RESAMPLES_AT_ONCE)))
    return np.concatenate(found)


def _resampled_metrics(
    first: Predictions, second: Predictions, metric: str, draw: np.random.Generator
) -> npt.NDArray[np.float64]:
    count = len(first.targets)
    samples = [np.arange(count), *draw.integers(0, count, (_FEW_RESAMPLES, count))]
    scores = [
        [
            (part := take(m, rows)).task.validate(part.outputs, part.targets)[metric]
            for m in (first, second)
        ]
        for rows in samples
    ]
    both = np.array(scores, np.float64)
    return np.asarray(both[:, 0] - both[:, 1])


def take(found: Predictions, rows: npt.NDArray[np.int64]) -> Predictions:
    """The predictions of some rows."""

    def chosen(values: Any) -> Any:
        return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]

    return found._replace(outputs=chosen(found.outputs), targets=chosen(found.targets))
