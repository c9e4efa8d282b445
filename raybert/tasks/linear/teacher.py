"""The linear model on n-grams as a teacher in distillation.

A model's own training texts do not show how certain it is of a new one. A labelled text is
therefore scored by a model of the other folds (stacking: Wolpert, 1992), a text without a label by
the mean of all of them.

Shapes: n texts, F n-grams, L outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raybert.tasks.labelled import Labelled
from raybert.tasks.linear.baseline import strings
from raybert.tasks.linear.features import NgramFeatures
from raybert.tasks.protocol import F32, TextTask

_FOLDS = 5
_MAX_TEXTS = 200_000  # labelled ones that each fold's model is fitted on


class LinearTeacher:
    """Teaches what a linear model answers to texts that it was not fitted on."""

    identity = f"baseline, {_FOLDS} folds"

    def __init__(self, seed: int, on_progress: Callable[[int], None] = lambda done: None) -> None:
        """`seed` draws the folds; `on_progress` gets the number of texts scored so far."""
        self._seed, self._on_progress = seed, on_progress

    def logits(self, texts: Labelled, task: TextTask) -> F32:
        """The outputs [n, L] of n texts, scaled so that labelled ones are calibrated."""
        targets = task.targets_where_known(texts.labels.to_pylist())
        is_known = ~np.asarray(texts.labels.is_null())
        known, unlabelled = np.flatnonzero(is_known), np.flatnonzero(~is_known)
        random = np.random.default_rng(self._seed)
        fold_of = random.permutation(len(known)) % _FOLDS
        features = NgramFeatures(strings(texts), task.output_kind, len(task.labels), len(known))
        outputs = np.zeros((len(targets), len(task.labels)), np.float32)
        for fold in range(_FOLDS):
            held_out, others = known[fold_of == fold], known[fold_of != fold][:_MAX_TEXTS]
            model = features.fit(features.weightings, others, targets[others])
            outputs[held_out] = features.outputs(model, held_out)
            outputs[unlabelled] += features.outputs(model, unlabelled) / _FOLDS
            self._on_progress(len(known) * (fold + 1) // _FOLDS)
        fitted = task.fit(outputs[known], targets[known])
        temperature = np.float32(fitted.fitted.get("temperature", 1.0))
        return np.asarray(outputs / temperature, np.float32)
