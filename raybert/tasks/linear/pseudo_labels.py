"""Linear models of texts that a better model has labelled (self-training: Scudder, 1965).

Of texts without labels, the half that the model is surest of counts, in the same proportion of each
label: the others would teach its mistakes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.tasks.labelled import Labelled
from raybert.tasks.linear.baseline import MAX_TEXTS, Baseline, fit_best, strings, targets_of
from raybert.tasks.protocol import F32, TextTask

_SURE_SHARE = 0.5


def fit_pseudo_labels(
    task: TextTask,
    texts: Labelled,
    outputs: F32,
    validation: Labelled,
    *,
    metric: str | None = None,
    seed: int = 0,
    refit: bool = False,
) -> Baseline:
    """Fit linear models on labelled texts and on a model's answers to the others; the best one.

    `outputs` are the model's for all texts, [n, L]; `refit` is that of `fit_best`.
    """
    is_labelled = ~np.asarray(texts.labels.is_null())
    labelled, others = np.flatnonzero(is_labelled), np.flatnonzero(~is_labelled)
    sure = others[sure_rows(task, outputs[others])]
    room = max(0, MAX_TEXTS - len(labelled))
    if len(sure) > room:
        sure = np.sort(np.random.default_rng(seed).choice(sure, room, replace=False))
    targets = np.concatenate(
        [targets_of(task, texts.take(labelled)), _answers(task, outputs[sure])]
    )
    rows = np.concatenate([labelled, sure])
    taught = strings(texts.take(rows))
    return fit_best(task, taught, targets, validation, metric=metric, refit=refit)


def sure_rows(task: TextTask, outputs: F32) -> npt.NDArray[np.int64]:
    """The half of the rows whose answers are surest, of each predicted class alike; ascending."""
    if task.output_kind == "number" or not len(outputs):
        return np.arange(len(outputs))
    if task.output_kind == "decision":
        return _surest(np.arange(len(outputs)), np.abs(outputs).min(axis=1))
    ranked = np.sort(outputs, axis=1)
    margin, chosen = ranked[:, -1] - ranked[:, -2], outputs.argmax(axis=1)
    parts = [_surest(np.flatnonzero(chosen == label), margin) for label in np.unique(chosen)]
    return np.sort(np.concatenate(parts))


def _surest(rows: npt.NDArray[np.int64], margin: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    count = int(np.ceil(_SURE_SHARE * len(rows)))
    order = np.argsort(-margin[rows], kind="stable")
    return np.sort(rows[order[:count]])


def _answers(task: TextTask, outputs: F32) -> npt.NDArray[Any]:
    """What a model's outputs say, as targets."""
    if task.output_kind == "class":
        return np.asarray(outputs.argmax(axis=1), np.int64)
    if task.output_kind == "decision":
        return (outputs > 0).astype(np.float32)
    return outputs
