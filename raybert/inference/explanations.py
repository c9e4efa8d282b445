"""Which words decided: integrated gradients (Sundararajan et al., arXiv 1703.01365, section 3).

On the straight way from the text with every word masked to the text itself, the gradient of the
decision over the words' embeddings is summed up: over the normalised ones, which are all of one
length, for before the norm a small vector's first step would turn it around. A word's weight is the
sum over its pieces; all weights together are the difference of the decision between the two ends,
but for the error of the sum over a finite number of steps, which is stated.

Shapes: T tokens, D hidden, L labels, S steps.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raybert.data.sources.files import LINE_BREAK
from raybert.errors import ConfigError
from raybert.inference.classifier import TextClassifier

STEPS = (24, 48, 96)  # of the Gauss-Legendre sum, until its error is small
TOLERANCE = 0.02  # of the decision's difference, or of 1 where that is less
_MOST_TOKENS = 16_384  # on the way in all, for the time that a request may take
_TOKENS_AT_ONCE = 2048  # gradients keep the states of all layers, about 20 KB a token and layer


@dataclass(frozen=True)
class Word:
    """A word of a text, and what it weighed."""

    text: str
    start: int  # in characters of the text
    end: int
    weight: float  # above 0: it spoke for the label


@dataclass(frozen=True)
class Explanation:
    """The words of a text that the model read, in their order."""

    words: list[Word]
    error: float  # how far their weights are from summing to the decision's difference
    label: str  # that the weights speak for
    decision: float  # its logit over the mean of the others', less the same for the masked text


class Explainer:
    """Explains a classifier's answers; not safe for threads."""

    def __init__(self, classifier: TextClassifier) -> None:
        """Use the classifier's fp32 weights, whatever it answers in."""
        self._classifier = classifier
        # Modules of its own, for it hooks them, on the same weights.
        model = classifier.model
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        self._device = next(self._model.parameters()).device

    def explain(self, text: str, label: int | None = None) -> Explanation:
        """Weigh the words of a text.

        A text past the model's length loses its middle first, and words in it have no weight.

        Args:
            text: a raw text.
            label: what the weights are to speak for; None: the likeliest label.
        """
        tokens = _tokenize(self._classifier, text)
        ids = torch.tensor(tokens.ids, dtype=torch.int64, device=self._device)  # [T]
        with torch.no_grad():
            embed = self._model.encoder.embeddings
            fixed = torch.tensor(tokens.is_frame, device=self._device)  # [T]
            masked = torch.where(fixed, ids, tokens.mask_id)
            start, there = embed(torch.stack([masked, ids]), None)  # [T, D] each
            ends = self._logits(ids, torch.stack([start, there]))  # [2, L]
        chosen = int(ends[1].argmax()) if label is None else label
        before, after = self._decision(ends, chosen).tolist()
        for steps in STEPS:
            pieces = self._weights(ids, start, there, chosen, steps).tolist()
            words = _by_word(text, tokens, pieces)
            error = abs(sum(word.weight for word in words) - (after - before))
            is_good = error <= TOLERANCE * max(1.0, abs(after - before))
            if is_good or 2 * steps * len(ids) > _MOST_TOKENS:
                break
        return Explanation(words, error, self._classifier.labels[chosen], after - before)

    def _weights(self, ids: Tensor, start: Tensor, there: Tensor, label: int, steps: int) -> Tensor:
        """Integrate the gradient on the way between two embeddings [T, D]: [T]."""
        nodes, weights = np.polynomial.legendre.leggauss(steps)  # over [-1, 1]
        at = torch.tensor((nodes + 1) / 2, dtype=torch.float32, device=self._device)
        shares = torch.tensor(weights / 2, dtype=torch.float32, device=self._device)
        way = there - start  # [T, D]
        gradient = torch.zeros_like(way)
        size = max(1, _TOKENS_AT_ONCE // len(ids))
        for begin in range(0, steps, size):
            part, share = (t[begin : begin + size, None, None] for t in (at, shares))
            points = (start + part * way).requires_grad_()  # [S, T, D]
            total = self._decision(self._logits(ids, points), label).sum()
            [slope] = torch.autograd.grad(total, points)
            gradient += (share * slope).sum(dim=0)
        return (way * gradient).sum(dim=1)

    def _logits(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Run the model on embeddings [S, T, D] in place of the ids' own: [S, L]."""
        embed = self._model.encoder.embeddings
        handle = embed.register_forward_hook(lambda module, given, output: embedded)
        try:
            logits: Tensor = self._model(ids.expand(len(embedded), -1))
        finally:
            handle.remove()
        return logits

    @staticmethod
    def _decision(logits: Tensor, label: int) -> Tensor:
        """A label's logit over the mean of the others': [S]."""
        others = logits.shape[1] - 1
        chosen = logits[:, label]
        return chosen - (logits.sum(dim=1) - chosen) / max(1, others)


@dataclass(frozen=True)
class _Tokens:
    """A text as the model reads it, each piece with its word and its place."""

    ids: list[int]  # [T]
    is_frame: list[bool]  # [T] whether the model's template set it, around every text
    words: list[int | None]  # [T] which word of the text; None: none
    places: list[tuple[int, int]]  # [T] in the text's characters
    mask_id: int


def _tokenize(classifier: TextClassifier, text: str) -> _Tokens:
    cleaned = classifier.preprocessing.clean(text)
    encoding = classifier.tokenizer.hf.encode(cleaned)
    kept = classifier.preprocessing.shorten(np.arange(len(encoding.ids))).tolist()
    places = _places(text, cleaned)
    ids = [encoding.ids[i] for i in kept]
    return _Tokens(
        ids=ids or [classifier.tokenizer.pad_id],
        is_frame=[bool(encoding.special_tokens_mask[i]) for i in kept] or [True],
        words=[encoding.word_ids[i] for i in kept] or [None],
        places=[_place(places, *encoding.offsets[i]) for i in kept] or [(0, 0)],
        mask_id=_mask_id(classifier),
    )


def _mask_id(classifier: TextClassifier) -> int:
    """The id that says nothing: the mask, or padding for tokenizers without one."""
    try:
        return classifier.tokenizer.mask_id
    except ConfigError:
        return classifier.tokenizer.pad_id


def _places(text: str, cleaned: str) -> list[int] | None:
    """Where each character of the cleaned text, and its end, stand in the text; None: the same."""
    if cleaned == text:
        return None
    places: list[int] = []
    at = 0
    for match in LINE_BREAK.finditer(text):  # each became one space
        places += [*range(at, match.start()), match.start()]
        at = match.end()
    return [*places, *range(at, len(text) + 1)]


def _place(places: list[int] | None, start: int, end: int) -> tuple[int, int]:
    return (start, end) if places is None else (places[start], places[end])


def _by_word(text: str, tokens: _Tokens, pieces: Sequence[float]) -> list[Word]:
    """Sum the pieces' weights by word. The frame's, which is the same at both ends, are 0."""
    found: dict[Any, list[Any]] = {}
    for word, (start, end), weight in zip(tokens.words, tokens.places, pieces, strict=True):
        if word is None or start == end:
            continue
        entry = found.setdefault(word, [start, end, 0.0])
        entry[0], entry[1] = min(entry[0], start), max(entry[1], end)
        entry[2] += weight
    return [
        Word(text[start:end], start, end, round(weight, 6))
        for start, end, weight in sorted(found.values())
    ]
