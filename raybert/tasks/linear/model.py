"""Linear models of texts.

Of texts two kinds are fitted: TF-IDF, and presence of n-grams times their log-count ratio (NB-SVM
with logistic loss: Wang and Manning, ACL 2012). A third one, where there are many texts without
labels, reads a text's coordinates along the leading singular vectors of all texts' TF-IDF (latent
semantic analysis: Deerwester et al., 1990). Each is a matrix of weights of n-grams in the end, and
the sum of two is a model, too.

Shapes: n texts, F n-grams, K weightings, L outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sparse

from raybert.tasks.linear.fitting import F32, Weights
from raybert.tasks.linear.ngrams import Ngrams, presence, tf_idf

Weighting = Literal["tf-idf", "log-count ratio", "latent semantic analysis"]


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
        return side_by_side(
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


def side_by_side(blocks: Sequence[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Join the features of several weightings, [n, F] each."""
    if len(blocks) == 1:
        return blocks[0]
    return sparse.hstack(blocks, format="csr", dtype=np.float32)
