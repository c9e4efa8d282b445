"""Linear models: logistic regression of labels, ridge regression of numbers.

Of texts two kinds are fitted: TF-IDF, and presence of n-grams times their log-count ratio (NB-SVM
with logistic loss: Wang and Manning, ACL 2012). A third one, where there are many texts without
labels, reads a text's coordinates along the leading singular vectors of all texts' TF-IDF (latent
semantic analysis: Deerwester et al., 1990). Each is a matrix of weights of n-grams in the end.

Shapes: n texts, F n-grams, L outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from sklearn.linear_model import LogisticRegression, Ridge

from raybert.tasks.linear.ngrams import Ngrams, inverse_frequency, presence, tf_idf

F32 = npt.NDArray[np.float32]
#: What an output is: one class of all, a decision of its own, or a number.
OutputKind = Literal["class", "decision", "number"]
Weighting = Literal["tf-idf", "log-count ratio", "latent semantic analysis"]

_MAX_WEIGHTS = 32_000_000  # numbers of a weight matrix: 128 MB
_MAX_NGRAMS = 500_000
_REGULARIZED_OUTPUTS = 64  # more are fitted by naive Bayes, in one pass for all of them
_INVERSE_PENALTY = {"tf-idf": 10.0, "log-count ratio": 1.0}  # C of scikit-learn
_LATENT_PENALTY = 30.0  # C on singular vectors, of which each is a sum of many n-grams
_LATENT_SIZE, _TEXTS_PER_VECTOR = 200, 50  # singular vectors: as many as texts tell nothing new
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


@dataclass(frozen=True)
class NgramModel:
    """A linear model of texts."""

    weighting: Weighting
    ngrams: Ngrams
    idf: F32 | None  # [F], of TF-IDF
    weights: Weights

    def outputs(self, texts: Sequence[tuple[str, ...]]) -> F32:
        """The outputs of texts, float32 [n, L]."""
        return self.weights.outputs(self.features(texts))

    def features(self, texts: Sequence[tuple[str, ...]]) -> sparse.csr_matrix:
        """What the weights are applied to, float32 [n, F]."""
        counts = self.ngrams.counts(texts)
        return presence(counts) if self.idf is None else tf_idf(counts, self.idf)


def fit_ngrams(
    texts: Sequence[tuple[str, ...]], targets: npt.NDArray[Any], kind: OutputKind, num_outputs: int
) -> list[NgramModel]:
    """Fit the models that suit the kind of output; validation texts choose among them.

    `targets`: int64 [n], or float32 [n, L]; NaN where there is none.
    """
    ngrams, counts = Ngrams.fit(texts, _most_ngrams(texts, num_outputs))
    idf = inverse_frequency(counts)
    models = [
        NgramModel("tf-idf", ngrams, idf, fit(tf_idf(counts, idf), targets, kind, num_outputs))
    ]
    if _has_ratios(kind, num_outputs):
        weights = _fit_by_ratio(presence(counts), targets, num_outputs)
        models.append(NgramModel("log-count ratio", ngrams, None, weights))
    return models


def fit_latent(
    texts: Sequence[tuple[str, ...]],
    unlabelled: Sequence[tuple[str, ...]],
    targets: npt.NDArray[Any],
    kind: OutputKind,
    num_outputs: int,
) -> NgramModel | None:
    """Fit a model of few labelled texts in the space of the singular vectors of all texts.

    `targets` are those of `fit_ngrams`. None: the texts have too few n-grams for such a space.
    """
    from sklearn.decomposition import TruncatedSVD

    together = [*texts, *unlabelled]
    ngrams, counts = Ngrams.fit(together, _most_ngrams(together, num_outputs))
    size = min(_LATENT_SIZE, len(together) // _TEXTS_PER_VECTOR, counts.shape[1] - 1)
    if size < 1:
        return None
    idf = inverse_frequency(counts)
    vectors = TruncatedSVD(size, n_iter=3, random_state=0)
    latent = sparse.csr_matrix(vectors.fit_transform(tf_idf(counts, idf))[: len(texts)])
    found = fit(latent, targets, kind, num_outputs, _LATENT_PENALTY)
    matrix = np.asarray(vectors.components_.T @ found.matrix, np.float32)
    return NgramModel("latent semantic analysis", ngrams, idf, Weights(matrix, found.bias))


def _has_ratios(kind: OutputKind, num_outputs: int) -> bool:
    return kind != "number" and num_outputs <= _REGULARIZED_OUTPUTS


class NgramFeatures:
    """The n-grams of texts, on parts of which linear models of one kind are fitted."""

    def __init__(
        self, texts: Sequence[tuple[str, ...]], kind: OutputKind, num_outputs: int
    ) -> None:
        self._kind, self._num_outputs = kind, num_outputs
        self._by_ratio = _has_ratios(kind, num_outputs)
        _, counts = Ngrams.fit(texts, _most_ngrams(texts, num_outputs))
        #: What weights are applied to, float32 [n, F].
        self.matrix: sparse.csr_matrix = (
            presence(counts) if self._by_ratio else tf_idf(counts, inverse_frequency(counts))
        )

    def fit(self, rows: npt.NDArray[np.int64], targets: npt.NDArray[Any]) -> Weights:
        """Fit a model on some of the texts; `targets` are theirs, as those of `fit_ngrams`."""
        features = self.matrix[rows]
        if self._by_ratio:
            return _fit_by_ratio(features, targets, self._num_outputs)
        return fit(features, targets, self._kind, self._num_outputs)


def _most_ngrams(texts: Sequence[tuple[str, ...]], num_outputs: int) -> int:
    columns = 3 if len(texts[0]) > 1 else 1
    return min(_MAX_NGRAMS, _MAX_WEIGHTS // num_outputs) // columns


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
    if num_outputs > _REGULARIZED_OUTPUTS:
        return _fit_naive_bayes(features, decisions)
    return _fit_each(decisions, num_outputs, lambda output: (features, strength, np.float32(1.0)))


def _fit_by_ratio(
    features: sparse.csr_matrix, targets: npt.NDArray[Any], num_outputs: int
) -> Weights:
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
