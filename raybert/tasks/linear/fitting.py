"""Fit linear models: logistic regression of labels, ridge regression of numbers.

Shapes: n texts, F features, L outputs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from sklearn.linear_model import LogisticRegression, Ridge

F32 = npt.NDArray[np.float32]
#: What an output is: one class of all, a decision of its own, or a number.
OutputKind = Literal["class", "decision", "number"]

REGULARIZED_OUTPUTS = 64  # more are fitted by naive Bayes, in one pass for all of them
_INVERSE_PENALTY = {"tf-idf": 10.0, "log-count ratio": 1.0}  # C of scikit-learn
_RIDGE = 1.0
_SMOOTHING = 1.0  # added to each n-gram's count of a label's texts


@dataclass(frozen=True)
class Weights:
    """outputs = features @ matrix + bias."""

    matrix: F32  # [F, L]
    bias: F32  # [L]

    def outputs(self, features: sparse.csr_matrix) -> F32:
        """The outputs of texts, float32 [n, L]."""
        return np.asarray(features @ self.matrix + self.bias, np.float32)


def fit(
    features: sparse.csr_matrix,
    targets: npt.NDArray[Any],
    kind: OutputKind,
    num_outputs: int,
    strength: float = _INVERSE_PENALTY["tf-idf"],
) -> Weights:
    """Fit one linear model for each output; `strength` is the inverse of the penalty on weights."""
    if kind == "number":
        return _fit_numbers(features, targets)
    decisions = _decisions(targets, num_outputs)
    if num_outputs > REGULARIZED_OUTPUTS:
        return _fit_naive_bayes(features, decisions)
    features.sort_indices()  # otherwise in place, by each of the threads that share them
    return _fit_each(decisions, num_outputs, lambda output: (features, strength, np.float32(1.0)))


def fit_by_ratio(
    features: sparse.csr_matrix, targets: npt.NDArray[Any], num_outputs: int
) -> Weights:
    """Fit logistic regressions of presence times the log-count ratio of each output."""
    decisions = _decisions(targets, num_outputs)

    def scaled(output: int) -> tuple[sparse.csr_matrix, float, F32]:
        target = decisions[:, output]
        counts = np.stack([features.T @ (target == value) for value in (1, 0)]) + _SMOOTHING
        ratio = np.log(counts / counts.sum(axis=1, keepdims=True))
        ratio = np.asarray(ratio[0] - ratio[1], np.float32)
        return features @ sparse.diags(ratio), _INVERSE_PENALTY["log-count ratio"], ratio

    return _fit_each(decisions, num_outputs, scaled)


def _fit_each(decisions: F32, num_outputs: int, scaled: Any) -> Weights:
    """Fit logistic regressions; `scaled(output)` gives features, penalty, and their scale.

    Of two classes one regression is fitted: the logits are its half with both signs.
    """
    is_pair = num_outputs == 2 and np.array_equal(decisions[:, 0], 1 - decisions[:, 1])
    outputs = [1] if is_pair else range(num_outputs)

    def one(output: int) -> tuple[F32, float]:
        features, strength, scale = scaled(output)
        return _fit_decision(features, decisions[:, output], strength, scale)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one, outputs))
    matrix = np.stack([weights for weights, _ in found], axis=1)
    bias = np.array([value for _, value in found])
    if is_pair:
        matrix = np.concatenate([-matrix / 2, matrix / 2], axis=1)
        bias = np.concatenate([-bias / 2, bias / 2])
    return Weights(np.asarray(matrix, np.float32), np.asarray(bias, np.float32))


def _fit_decision(
    features: sparse.csr_matrix, target: F32, strength: float, scale: F32 | np.float32
) -> tuple[F32, float]:
    known = ~np.isnan(target)
    y = target[known]
    if features.shape[1] == 0 or len(np.unique(y)) < 2:  # its frequency is all there is to know
        p = np.clip(y.mean() if len(y) else 0.5, 1e-3, 1 - 1e-3)
        return np.zeros(features.shape[1], np.float32), float(np.log(p / (1 - p)))
    model = LogisticRegression(solver="liblinear", C=strength, tol=1e-2, random_state=0)
    model.fit(features[known] if not known.all() else features, y > 0.5)
    return np.asarray(model.coef_[0] * scale, np.float32), float(model.intercept_[0])


def _decisions(targets: npt.NDArray[Any], num_outputs: int) -> F32:
    """Targets as 0, 1 or NaN, float32 [n, L]."""
    if targets.ndim == 2:
        return np.asarray(targets, np.float32)
    one_hot = np.zeros((len(targets), num_outputs), np.float32)
    known = targets >= 0
    one_hot[np.flatnonzero(known), targets[known]] = 1
    one_hot[~known] = np.nan
    return one_hot


def _fit_naive_bayes(features: sparse.csr_matrix, decisions: F32) -> Weights:
    """The log-count ratio of each output against the others: one pass for all of them."""
    is_one = np.nan_to_num(decisions)  # [n, L]
    with_label = features.T @ is_one + _SMOOTHING  # [F, L]
    without = features.T @ (~np.isnan(decisions) - is_one) + _SMOOTHING
    matrix = np.log(with_label / with_label.sum(axis=0, keepdims=True))
    matrix -= np.log(without / without.sum(axis=0, keepdims=True))
    share = (is_one.sum(axis=0) + 1) / ((~np.isnan(decisions)).sum(axis=0) + 2)
    bias = np.log(share / (1 - share))
    return Weights(np.asarray(matrix, np.float32), np.asarray(bias, np.float32))


def _fit_numbers(features: sparse.csr_matrix, targets: npt.NDArray[Any]) -> Weights:
    columns, biases = [], []
    for column in np.asarray(targets, np.float64).T:
        known = ~np.isnan(column)
        mean = column[known].mean() if known.any() else 0.0
        if features.shape[1] == 0 or known.sum() < 2:
            columns.append(np.zeros(features.shape[1]))
            biases.append(mean)
            continue
        model = Ridge(alpha=_RIDGE, solver="sag" if known.sum() > 20_000 else "auto")
        model.fit(features[known], column[known])
        columns.append(model.coef_)
        biases.append(model.intercept_)
    return Weights(np.stack(columns, axis=1).astype(np.float32), np.array(biases, np.float32))
