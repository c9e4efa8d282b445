"""A linear model beside an encoder: outputs are a weighted sum of both models' outputs.

The two weights are fitted on validation texts, which neither model was trained on (stacking:
Wolpert, 1992; of a linear and a deep part: arXiv 1606.07792).

Shapes: n texts, L outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from raybert.tasks.comparison import text_losses
from raybert.tasks.linear.model import NgramModel
from raybert.tasks.protocol import F32, TextTask

_START = (1.0, 0.5)
_MOST = 20.0  # of a weight


@dataclass(frozen=True)
class NgramPart:
    """What a model directory has beside the encoder: a linear model, weights, a fitted task."""

    model: NgramModel
    encoder_weight: float
    linear_weight: float
    task: TextTask  # with what was fitted for the sums

    def calibrated(self) -> NgramPart:
        """The same with the temperature in the weights, as a model has it in its output layer."""
        temperature = self.task.fitted.get("temperature")
        if temperature is None:
            return self
        fitted = {key: value for key, value in self.task.fitted.items() if key != "temperature"}
        return NgramPart(
            self.model,
            self.encoder_weight / temperature,
            self.linear_weight / temperature,
            replace(self.task, fitted=fitted),
        )

    def add(self, encoder: F32, linear: F32) -> F32:
        """The outputs of both parts together, float32 [n, L]."""
        together = self.encoder_weight * encoder + self.linear_weight * linear
        return np.asarray(together, np.float32)


def fit_part(
    task: TextTask, model: NgramModel, encoder: F32, linear: F32, targets: npt.NDArray[Any]
) -> NgramPart:
    """Fit both weights, and the task's answers to their sums, on validation outputs [n, L]."""
    if task.output_kind == "number":
        weights = _least_squares(encoder, linear, targets)
    else:
        weights = _most_likely(task, encoder, linear, targets)
    part = NgramPart(model, *weights, task)
    return replace(part, task=task.fit(part.add(encoder, linear), targets)).calibrated()


def _most_likely(
    task: TextTask, encoder: F32, linear: F32, targets: npt.NDArray[Any]
) -> tuple[float, float]:
    plain = replace(task, fitted={})  # no temperature

    def loss(weights: npt.NDArray[np.float64]) -> float:
        losses = text_losses(plain, weights[0] * encoder + weights[1] * linear, targets)
        assert losses is not None  # of outputs that are no numbers
        return float(losses.mean())

    found = minimize(
        loss, _START, method="Nelder-Mead", bounds=[(0, _MOST)] * 2, options={"maxfev": 80}
    )
    return float(found.x[0]), float(found.x[1])


def _least_squares(encoder: F32, linear: F32, targets: npt.NDArray[Any]) -> tuple[float, float]:
    """Weights that add up to 1, so that the unit stays."""
    known = ~np.isnan(targets)
    step, wanted = (linear - encoder)[known], (targets - encoder)[known]
    share = float(np.clip((step @ wanted) / max(1e-12, float(step @ step)), 0, 1))
    return 1 - share, share
