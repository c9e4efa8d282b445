"""Words and runs of two or three words of texts, as sparse matrices for a linear model.

Shapes: n texts, F n-grams.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from sklearn.feature_extraction.text import CountVectorizer

#: Words, and single characters of scripts that put no spaces between words: Thai to Khmer, kana,
#: Han. Their pairs of characters are then the 2-grams.
_TOKENS = r"(?u)[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\w+"
_RARE_TEXTS = 2  # n-grams of fewer texts are left out, where there are many texts
_MANY_TEXTS = 1000


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of the training texts.

    Each has a column of a matrix; of pairs three: for the first text, the second, and both.
    """

    index: dict[str, int]  # of the columns, in their order

    @classmethod
    def fit(
        cls, texts: Sequence[tuple[str, ...]], limit: int, longest: int = 2
    ) -> tuple[Ngrams, sparse.csr_matrix]:
        """Collect the at most `limit` most frequent n-grams of texts or pairs; also count them.

        `longest`: words of an n-gram, at most.
        """
        vectors = CountVectorizer(
            ngram_range=(1, longest),
            token_pattern=_TOKENS,
            min_df=_RARE_TEXTS if len(texts) > _MANY_TEXTS else 1,
            max_features=limit,
            dtype=np.float32,
        )
        sides = list(zip(*texts, strict=True))
        try:
            counts = vectors.fit_transform([text for side in sides for text in side])
        except ValueError:  # no word in any text
            return cls({}), cls({}).counts(texts)
        names = vectors.get_feature_names_out()
        ngrams = cls({name: column for column, name in enumerate(names)})
        return ngrams, _join([counts[i * len(texts) :][: len(texts)] for i in range(len(sides))])

    def counts(self, texts: Sequence[tuple[str, ...]]) -> sparse.csr_matrix:
        """How often each n-gram is in each text, float32 [n, F]; of pairs [n, 3F]."""
        return _join([self._counts(side) for side in zip(*texts, strict=True)])

    def _counts(self, texts: Sequence[str]) -> sparse.csr_matrix:
        if not self.index:
            return sparse.csr_matrix((len(texts), 0), dtype=np.float32)
        return self._vectors.transform(texts)

    @functools.cached_property
    def names(self) -> list[str]:
        """The n-grams in the order of their columns."""
        return list(self.index)

    @functools.cached_property
    def longest(self) -> int:
        """The words of the longest n-gram; 1 where there is none."""
        return 1 + max((name.count(" ") for name in self.index), default=0)

    @functools.cached_property
    def _vectors(self) -> CountVectorizer:
        """Kept, because it checks its vocabulary when it is made."""
        return CountVectorizer(
            ngram_range=(1, self.longest),
            token_pattern=_TOKENS,
            vocabulary=self.index,
            dtype=np.float32,
        )


def tokens(text: str) -> list[tuple[str, int, int]]:
    """The words of a text as n-grams have them, with their characters."""
    lower = text.lower()
    if len(lower) != len(text):  # a letter whose lower case is two letters
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return [(m.group(), m.start(), m.end()) for m in re.finditer(_TOKENS, lower)]


def _join(sides: list[sparse.csr_matrix]) -> sparse.csr_matrix:
    if len(sides) == 1:
        return sides[0]
    return sparse.hstack([*sides, sides[0].minimum(sides[1])], format="csr", dtype=np.float32)


def presence(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """1 where an n-gram is in a text, float32 [n, F]."""
    found = counts.copy()
    found.data.fill(1.0)
    return found


def inverse_frequency(counts: sparse.csr_matrix) -> npt.NDArray[np.float32]:
    """The logarithm of how rare each n-gram is among texts, float32 [F]."""
    texts_with = np.bincount(counts.indices, minlength=counts.shape[1])
    return np.asarray(np.log((1 + counts.shape[0]) / (1 + texts_with)) + 1, np.float32)


def tf_idf(counts: sparse.csr_matrix, idf: npt.NDArray[np.float32]) -> sparse.csr_matrix:
    """Logarithmic counts times `idf`, each text scaled to length 1, float32 [n, F]."""
    scaled = counts.copy()
    scaled.data = (1 + np.log(scaled.data)) * idf[scaled.indices]
    norms = np.sqrt(np.asarray(scaled.multiply(scaled).sum(axis=1)).ravel())
    repeated: Any = np.repeat(np.maximum(norms, 1e-12), np.diff(scaled.indptr))
    scaled.data = np.asarray(scaled.data / repeated, np.float32)
    return scaled
