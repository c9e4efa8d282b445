"""Linear models: logistic regression of labels, ridge regression of numbers.

Of texts two kinds are fitted: TF-IDF, and presence of n-grams times their log-count ratio (NB-SVM
with logistic loss: Wang and Manning, ACL 2012). A third one, where there are many texts without
labels, reads a text's coordinates along the leading singular vectors of all texts' TF-IDF (latent
semantic analysis: Deerwester et al., 1990). Each is a matrix of weights of n-grams in the end, and
the sum of two is a model, too.

Shapes: n texts, F n-grams, K weightings, L outputs.
"""

from __future__ import annotations

import functools
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
_TEXTS_FOR_TRIGRAMS = 10_000  # labelled ones: in fewer, runs of three words repeat too rarely
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
    """A linear model of texts, or the sum of several with the same n-grams."""

    weightings: tuple[Weighting, ...]  # one for each block of features
    ngrams: Ngrams
    idf: F32 | None  # [F]; None: no block is weighted by it
    weights: Weights  # [K * F, L]

    @property
    def columns(self) -> int:
        """The columns of each block of features: F, of pairs 3F of as many n-grams."""
        return len(self.weights.matrix) // len(self.weightings)

    def outputs(self, texts: Sequence[tuple[str, ...]]) -> F32:
        """The outputs of texts, float32 [n, L]."""
        return self.weights.outputs(self.features(texts))

    def features(self, texts: Sequence[tuple[str, ...]]) -> sparse.csr_matrix:
        """What the weights are applied to, float32 [n, K * F]."""
        counts = self.ngrams.counts(texts)
        found, idf = presence(counts), self.idf
        weighted = found if idf is None else tf_idf(counts, idf)
        return _side_by_side(
            [found if kind == "log-count ratio" else weighted for kind in self.weightings]
        )

    def add(self, other: NgramModel) -> NgramModel:
        """The sum of two models of the same n-grams."""
        return NgramModel(
            self.weightings + other.weightings,
            self.ngrams,
            other.idf if self.idf is None else self.idf,
            Weights(
                np.concatenate([self.weights.matrix, other.weights.matrix]),
                self.weights.bias + other.weights.bias,
            ),
        )


def _side_by_side(blocks: Sequence[sparse.csr_matrix]) -> sparse.csr_matrix:
    if len(blocks) == 1:
        return blocks[0]
    return sparse.hstack(blocks, format="csr", dtype=np.float32)


def _below(first: sparse.csr_matrix, second: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.vstack([first, second], format="csr", dtype=np.float32)


class NgramFeatures:
    """The n-grams of texts, on parts of which linear models are fitted.

    They are counted once for all models. Rows are those of `texts`, and then those of `extend`.
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, ...]],
        kind: OutputKind,
        num_outputs: int,
        num_labelled: int | None = None,
    ) -> None:
        """`num_labelled`: of how many texts labels are known; None: of all."""
        self._kind, self._num_outputs = kind, num_outputs
        longest = 3 if (num_labelled or len(texts)) >= _TEXTS_FOR_TRIGRAMS else 2
        self._ngrams, counts = Ngrams.fit(texts, _most_ngrams(texts, num_outputs), longest)
        self._idf = inverse_frequency(counts)
        counts.sort_indices()
        self._weighted, self._present = tf_idf(counts, self._idf), presence(counts)
        self._num_texts = len(texts)

    def extend(self, texts: Sequence[tuple[str, ...]]) -> npt.NDArray[np.int64]:
        """Count the known n-grams of further texts, as those of new ones; return their rows, [n].

        They add no n-gram and do not change how rare one is: a text whose own n-grams were all
        known would look unlike new ones.
        """
        counts = self._ngrams.counts(texts)
        counts.sort_indices()
        first = self._present.shape[0]
        self._weighted = _below(self._weighted, tf_idf(counts, self._idf))
        self._present = _below(self._present, presence(counts))
        return np.arange(first, first + len(texts))

    @property
    def weightings(self) -> tuple[Weighting, ...]:
        """Of models that suit the kind of output, whether or not there are unlabelled texts."""
        if self._kind == "number" or self._num_outputs > _REGULARIZED_OUTPUTS:
            return ("tf-idf",)
        return "tf-idf", "log-count ratio"

    def fit_candidates(
        self, rows: npt.NDArray[np.int64], targets: npt.NDArray[Any], *, latent: bool = False
    ) -> list[NgramModel]:
        """Fit the models that suit the kind of output; validation texts choose among them.

        Args:
            rows: the texts to fit on, [n].
            targets: theirs: int64 [n], or float32 [n, L]; NaN where there is none.
            latent: most texts have no label.
        """
        first, *ratios = (self.fit((kind,), rows, targets) for kind in self.weightings)
        models = [first]
        if latent and self._latent is not None:
            models.append(self.fit(("latent semantic analysis",), rows, targets))
        return models + ratios + [model.add(ratio) for ratio in ratios for model in models]

    def fit(
        self,
        weightings: tuple[Weighting, ...],
        rows: npt.NDArray[np.int64],
        targets: npt.NDArray[Any],
    ) -> NgramModel:
        """Fit one model, the sum of one for each weighting; arguments as above."""
        models = [
            NgramModel(
                (weighting,),
                self._ngrams,
                None if weighting == "log-count ratio" else self._idf,
                self._fit(weighting, rows, targets),
            )
            for weighting in weightings
        ]
        return functools.reduce(NgramModel.add, models)

    def outputs(self, model: NgramModel, rows: npt.NDArray[np.int64]) -> F32:
        """What a model that was fitted here answers to some of the texts, float32 [n, L]."""
        found, weighted = self._present, self._weighted
        blocks = [found if kind == "log-count ratio" else weighted for kind in model.weightings]
        return model.weights.outputs(_side_by_side([block[rows] for block in blocks]))

    def _fit(
        self, weighting: Weighting, rows: npt.NDArray[np.int64], targets: npt.NDArray[Any]
    ) -> Weights:
        kind, num_outputs = self._kind, self._num_outputs
        if weighting == "log-count ratio":
            return _fit_by_ratio(self._present[rows], targets, num_outputs)
        if weighting == "tf-idf":
            return fit(self._weighted[rows], targets, kind, num_outputs)
        assert self._latent is not None
        coordinates = sparse.csr_matrix(self._weighted[rows] @ self._latent.T)
        found = fit(coordinates, targets, kind, num_outputs, _LATENT_PENALTY)
        return Weights(np.asarray(self._latent.T @ found.matrix, np.float32), found.bias)

    @functools.cached_property
    def _latent(self) -> F32 | None:
        """The leading singular vectors of the texts' TF-IDF, [V, F].

        None: the texts have too few n-grams for such a space.
        """
        from sklearn.decomposition import TruncatedSVD

        texts = self._weighted[: self._num_texts]
        size = min(_LATENT_SIZE, texts.shape[0] // _TEXTS_PER_VECTOR, texts.shape[1] - 1)
        if size < 1:
            return None
        found = TruncatedSVD(size, n_iter=3, random_state=0).fit(texts)
        return np.asarray(found.components_, np.float32)


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
    features.sort_indices()  # otherwise in place, by each of the threads that share them
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
