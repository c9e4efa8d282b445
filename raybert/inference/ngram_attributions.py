"""What the n-gram part of a model adds to the attributions of words.

The part is linear: an n-gram's share of the margin is its weight times its value, over the text
without words. It is divided evenly among the places where the n-gram occurs and the words of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from raybert.tasks.linear.mixture import NgramPart
from raybert.tasks.linear.ngrams import tokens


class Share(NamedTuple):
    """What a word adds to the margin: of a pair's text `input`, its characters, the weight."""

    input: int
    start: int
    end: int
    weight: float


def ngram_shares(part: NgramPart, texts: Sequence[str], chosen: Any) -> list[Share]:
    """The shares of the words of a text, or of a pair's texts, in favour of an output."""
    features = part.model.features([tuple(texts)])  # [1, K * F]
    values = part.linear_weight * features.data[:, None]
    outputs = values * part.model.weights.matrix[features.indices]  # [n-grams, L]
    margins = part.task.margin(torch.from_numpy(np.asarray(outputs, np.float32)), chosen).tolist()
    names, places = part.model.ngrams.names, _places(texts, part.model.ngrams.longest)
    found: dict[tuple[int, int, int], float] = defaultdict(float)
    for column, margin in zip(features.indices.tolist(), margins, strict=True):
        side, index = divmod(column % part.model.columns, len(names))
        # Columns of a pair: those of the first text, of the second, of n-grams that both have.
        sides = (0, 1) if side == len(texts) and len(texts) > 1 else (side,)
        where = [(i, words) for i in sides for words in places[i][names[index]]]
        for i, words in where:
            for start, end in words:
                found[i, start, end] += margin / len(where) / len(words)
    return [Share(*key, weight) for key, weight in sorted(found.items())]


def _places(texts: Sequence[str], longest: int) -> list[dict[str, list[list[tuple[int, int]]]]]:
    """Of each text, where its n-grams are: the characters of their words."""
    found = []
    for text in texts:
        places: dict[str, list[list[tuple[int, int]]]] = defaultdict(list)
        for name, words in _ngrams(text, longest):
            places[name].append(words)
        found.append(places)
    return found


def _ngrams(text: str, longest: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    words = tokens(text)
    for first in range(len(words)):
        for end in range(first + 1, min(len(words), first + longest) + 1):
            run = words[first:end]
            name = " ".join(word for word, _, _ in run)
            yield name, [(start, stop) for _, start, stop in run]
