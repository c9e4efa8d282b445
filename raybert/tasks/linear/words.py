"""A linear model of words in their context, for tasks that tag them.

Shapes: W words, F features, L tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from sklearn.feature_extraction import FeatureHasher

from raybert.tasks.linear.fitting import F32, Weights, fit

_FEATURES = 1 << 18
_MAX_WORDS = 300_000  # of the training texts: a minute of fitting


@dataclass(frozen=True)
class WordModel:
    """A logistic regression on a word, its shape, its ends and its neighbours."""

    weights: Weights

    def outputs(self, words: Sequence[str]) -> F32:
        """The logits of a text's words, float32 [W, L]."""
        return self.weights.outputs(_matrix([words]))


def fit_words(
    texts: Sequence[Sequence[str]],
    tags: Sequence[npt.NDArray[np.int64]],
    num_tags: int,
) -> WordModel:
    """Fit on the words of texts and the tag of each."""
    counts = np.cumsum([len(words) for words in texts])
    used = int(np.searchsorted(counts, _MAX_WORDS)) + 1
    targets = np.concatenate(tags[:used])
    return WordModel(fit(_matrix(texts[:used]), targets, "class", num_tags))


def _matrix(texts: Sequence[Sequence[str]]) -> sparse.csr_matrix:
    hasher = FeatureHasher(_FEATURES, input_type="string", alternate_sign=False, dtype=np.float32)
    return hasher.transform(features for words in texts for features in _features(words))


def _features(words: Sequence[str]) -> Iterator[list[str]]:
    around = ["", *words, ""]
    for before, word, after in zip(around, words, around[2:], strict=False):
        lower = word.lower()
        yield [
            f"word {lower}",
            f"shape {_shape(word)}",
            f"begins {lower[:3]}",
            f"ends {lower[-3:]}",
            f"before {before.lower()}",
            f"before {_shape(before)}",
            f"after {after.lower()}",
            f"after {_shape(after)}",
        ]


def _shape(word: str) -> str:
    """Letters as a or A, digits as 0, repetitions once: `B-747` is A-0."""
    letters = "".join(
        "0" if c.isdigit() else "A" if c.isupper() else "a" if c.isalpha() else c for c in word
    )
    return re.sub(r"(.)\1+", r"\1", letters)
