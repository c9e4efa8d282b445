"""Whether a model on held-out texts is better with an n-gram part than without."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raybert.tasks.comparison import Difference, Predictions, paired_difference
from raybert.tasks.linear.mixture import NgramPart, fit_part
from raybert.tasks.linear.model import NgramModel
from raybert.tasks.protocol import F32, TextTask

#: With fewer validation texts the loss decides: of 50 texts one is two points of accuracy, while
#: the loss counts how far each output is off.
FEW_TEXTS = 1000
_FOLDS = 5


def deciding_metric(task: TextTask, texts: int) -> str:
    """The validation metric by which models of a task are compared on so many texts."""
    return "loss" if texts < FEW_TEXTS else task.default_metric


class Trial(NamedTuple):
    """An n-gram part, and what it brings."""

    part: NgramPart
    metric: str
    difference: Difference  # positive: better with the part
    values: tuple[float, float, float]  # of both, of the encoder, of the n-grams alone


def try_part(
    task: TextTask,
    model: NgramModel,
    linear_task: TextTask,
    encoder: F32,
    linear: F32,
    targets: npt.NDArray[Any],
) -> Trial:
    """Fit an n-gram part on validation outputs [n, L], and compare it with the encoder alone.

    The sums that are compared have weights that were fitted on other texts than their own, and the
    encoder's outputs a scale that was fitted in the same way.
    """
    part = fit_part(task, model, encoder, linear, targets)
    metric = deciding_metric(task, len(targets))
    ours = Predictions(part.task, _held_out_sums(task, part, encoder, linear, targets), targets)
    alone = Predictions(task, encoder, targets)
    ngrams = Predictions(linear_task, linear, targets)
    both, single, third = (
        float(m.task.validate(m.outputs, m.targets)[metric]) for m in (ours, alone, ngrams)
    )
    if task.output_kind != "number":
        scaled = _held_out_sums(task, part, encoder, np.zeros_like(linear), targets)
        alone = Predictions(task, scaled, targets)
    difference = paired_difference(ours, alone, metric=metric)
    return Trial(part, metric, difference, (both, single, third))


def _held_out_sums(
    task: TextTask, part: NgramPart, encoder: F32, linear: F32, targets: npt.NDArray[Any]
) -> F32:
    """The outputs of both parts, each fold's by weights of the other folds, [n, L]."""
    fold = np.random.default_rng(0).permutation(len(targets)) % _FOLDS
    if len(targets) < 2 * _FOLDS:
        return part.add(encoder, linear)
    sums = np.empty_like(encoder)
    for number in range(_FOLDS):
        held = fold == number
        rest = ~held
        fitted = fit_part(task, part.model, encoder[rest], linear[rest], targets[rest])
        sums[held] = fitted.add(encoder[held], linear[held])
    return sums
