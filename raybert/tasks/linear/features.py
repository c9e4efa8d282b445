"""The n-grams of a run's texts, counted once for the linear models that are fitted on them.

Shapes: n texts, F n-grams, V singular vectors, L outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse

from raybert.tasks.linear.fitting import (
    F32,
    REGULARIZED_OUTPUTS,
    OutputKind,
    Weights,
    fit,
    fit_by_ratio,
)
from raybert.tasks.linear.model import NgramModel, Weighting, side_by_side
from raybert.tasks.linear.ngrams import Ngrams, inverse_frequency, presence, tf_idf

_MAX_WEIGHTS = 32_000_000  # numbers of a weight matrix: 128 MB
_MAX_NGRAMS = 500_000
_TEXTS_FOR_TRIGRAMS = 10_000  # labelled ones: in fewer, runs of three words repeat too rarely
_LATENT_PENALTY = 30.0  # C on singular vectors, of which each is a sum of many n-grams
_LATENT_SIZE, _TEXTS_PER_VECTOR = 200, 50  # singular vectors: as many as texts tell nothing new


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
        if self._kind == "number" or self._num_outputs > REGULARIZED_OUTPUTS:
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
        return model.weights.outputs(side_by_side([block[rows] for block in blocks]))

    def _fit(
        self, weighting: Weighting, rows: npt.NDArray[np.int64], targets: npt.NDArray[Any]
    ) -> Weights:
        kind, num_outputs = self._kind, self._num_outputs
        if weighting == "log-count ratio":
            return fit_by_ratio(self._present[rows], targets, num_outputs)
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


def _below(first: sparse.csr_matrix, second: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.vstack([first, second], format="csr", dtype=np.float32)


def _most_ngrams(texts: Sequence[tuple[str, ...]], num_outputs: int) -> int:
    columns = 3 if len(texts[0]) > 1 else 1
    return min(_MAX_NGRAMS, _MAX_WEIGHTS // num_outputs) // columns
