"""Word attributions by integrated gradients (Sundararajan et al., arXiv 1703.01365, section 3).

The baseline is the text with every word masked. The margin, a label's logit minus the mean of the
others', is differentiated along the straight path from the baseline's embeddings to the text's.
The path is one of normalized embeddings: before the norm, the first step away from a short vector
changes its direction most. A word's weight is the sum over its tokens. All weights sum to the
margin's difference between text and baseline, up to the error of the numerical integral, which is
returned.

Shapes: T tokens, D hidden, L labels, S steps.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raybert.data.preprocess import LINE_BREAK, kept_of_pair
from raybert.errors import ConfigError
from raybert.inference.classifier import Text, TextClassifier

STEPS = (24, 48, 96)  # of the Gauss-Legendre quadrature, in turn until its error is small
TOLERANCE = 0.02  # relative to the margin's difference, or to 1 if that is less
_MAX_TOKENS = 16_384  # of a text times steps: a bound on the time of a request
_TOKENS_PER_BATCH = 2048  # backward keeps all layers' activations, about 20 KB per token and layer


@dataclass(frozen=True)
class Word:
    """A word of a text and its attribution."""

    text: str
    start: int  # in characters of the text
    end: int
    weight: float  # positive: in favour of the label
    input: int = 0  # of a pair: 0 or 1


@dataclass(frozen=True)
class Explanation:
    """The attributions of a text's words."""

    words: list[Word]  # those that the model read, in the text's order
    error: float  # |sum of the weights - margin|
    label: str  # that positive weights are in favour of
    margin: float  # what `TextTask.margin` explains; the text's minus the baseline's


class Explainer:
    """Explains a classifier's predictions. Not thread-safe."""

    def __init__(self, classifier: TextClassifier) -> None:
        """Use the classifier's fp32 weights, whatever precision it scores in."""
        self._classifier = classifier
        # A copy of the modules, because it adds hooks to them; the tensors are shared.
        model = classifier.model
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        self._device = next(self._model.parameters()).device
        try:
            self._mask_id = classifier.tokenizer.mask_id
        except ConfigError:  # the tokenizer has no mask
            self._mask_id = classifier.tokenizer.pad_id

    def explain(self, text: Text, label: Any = None) -> Explanation:
        """Compute the attributions of a text's words for an output, by default the task's choice.

        The middle of a text that is longer than the model is left out; words in it have no weight.
        """
        tokens = _tokenize(self._classifier, text)
        given = [token.id for token in tokens]
        ids = torch.tensor(given, dtype=torch.int64, device=self._device)  # [T]
        with torch.no_grad():
            embed = self._model.encoder.embeddings
            is_special = [token.is_special for token in tokens]
            keep = torch.tensor(is_special, device=self._device)  # [T]
            masked = torch.where(keep, ids, self._mask_id)
            baseline, target = embed(torch.stack([masked, ids]))  # [T, D] each
            ends = self._logits(ids, torch.stack([baseline, target]))  # [2, L]
        task = self._classifier.task
        chosen = task.choose(ends[1]) if label is None else label
        at_baseline, at_target = task.margin(ends, chosen).tolist()
        margin = at_target - at_baseline
        for steps in STEPS:
            weights = self._attributions(ids, baseline, target, chosen, steps).tolist()
            words = _by_word(text, tokens, weights)
            error = abs(sum(word.weight for word in words) - margin)
            is_close = error <= TOLERANCE * max(1.0, abs(margin))
            if is_close or 2 * steps * len(ids) > _MAX_TOKENS:
                break
        name = self._classifier.labels[np.atleast_1d(chosen)[-1]]
        return self._with_ngrams(Explanation(words, error, name, margin), text, chosen)

    def _with_ngrams(self, found: Explanation, text: Text, chosen: Any) -> Explanation:
        """Add what the model's n-gram part says about the same margin."""
        part = self._classifier.ngrams
        if part is None:
            return found
        from raybert.inference.ngram_attributions import ngram_shares

        texts = [text] if isinstance(text, str) else list(text)
        scale = part.encoder_weight
        words = [replace(word, weight=round(scale * word.weight, 6)) for word in found.words]
        ends = [(word.input, word.end) for word in words]  # sorted
        margin, added = scale * found.margin, []
        for share in ngram_shares(part, texts, chosen):
            margin += share.weight
            at = bisect.bisect_right(ends, (share.input, share.start))  # the first that ends later
            word = words[at] if at < len(words) else None
            if word is not None and word.input == share.input and word.start < share.end:
                words[at] = replace(word, weight=round(word.weight + share.weight, 6))
            else:  # a word of a long text that the encoder does not read
                spelled = texts[share.input][share.start : share.end]
                weight = round(share.weight, 6)
                added.append(Word(spelled, share.start, share.end, weight, share.input))
        words = sorted([*words, *added], key=lambda word: (word.input, word.start))
        return Explanation(words, scale * found.error, found.label, margin)

    def _attributions(
        self, ids: Tensor, baseline: Tensor, target: Tensor, label: Any, steps: int
    ) -> Tensor:
        """Integrate the margin's gradient between two embeddings [T, D]: [T]."""
        nodes, weights = np.polynomial.legendre.leggauss(steps)  # over [-1, 1]
        positions = torch.tensor((nodes + 1) / 2, dtype=torch.float32, device=self._device)
        shares = torch.tensor(weights / 2, dtype=torch.float32, device=self._device)
        path = target - baseline  # [T, D]
        integral = torch.zeros_like(path)
        size = max(1, _TOKENS_PER_BATCH // len(ids))
        for begin in range(0, steps, size):
            position, share = (t[begin : begin + size, None, None] for t in (positions, shares))
            points = (baseline + position * path).requires_grad_()  # [S, T, D]
            outputs = self._logits(ids, points)
            total = self._classifier.task.margin(outputs, label).sum()
            [gradient] = torch.autograd.grad(total, points)
            integral += (share * gradient).sum(dim=0)
        return (path * integral).sum(dim=1)

    def _logits(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Run the model on embeddings [S, T, D] in place of the ids' own: [S, L]."""
        embed = self._model.encoder.embeddings
        handle = embed.register_forward_hook(lambda module, args, output: embeddings)
        try:
            logits: Tensor = self._model(ids.expand(len(embeddings), -1))
        finally:
            handle.remove()
        return logits


@dataclass(frozen=True)
class _Token:
    """A token as the model reads it."""

    id: int
    is_special: bool = True  # added around the texts by the tokenizer's template
    input: int = 0  # of a pair: which text it is of
    word: int | None = None  # index of its word in the text; None: of no word
    span: tuple[int, int] = (0, 0)  # in characters of the text


def _tokenize(classifier: TextClassifier, text: Text) -> list[_Token]:
    tokenizer, how = classifier.tokenizer, classifier.preprocessing
    if isinstance(text, str):
        encoded = _encode(classifier, text, 0, special=True)
        kept = how.shorten(np.arange(len(encoded))).tolist()
        return [encoded[i] for i in kept] or [_Token(tokenizer.pad_id)]
    first, second = (_encode(classifier, t, i, special=False) for i, t in enumerate(text))
    template = tokenizer.pair_template
    counts = kept_of_pair(len(first), len(second), how.seq_len - template.length)
    before, between, after = ([_Token(i) for i in ids] for ids in template)
    return [*before, *first[: counts[0]], *between, *second[: counts[1]], *after]


def _encode(classifier: TextClassifier, text: str, index: int, *, special: bool) -> list[_Token]:
    cleaned = classifier.preprocessing.clean(text)
    encoding = classifier.tokenizer.hf.encode(cleaned, add_special_tokens=special)
    offsets = _character_offsets(text, cleaned)
    return [
        _Token(id, bool(is_special), index, word, (offsets[start], offsets[end]))
        for id, is_special, word, (start, end) in zip(
            encoding.ids,
            encoding.special_tokens_mask,
            encoding.word_ids,
            encoding.offsets,
            strict=True,
        )
    ]


def _character_offsets(text: str, cleaned: str) -> list[int]:
    """The offset in `text` of each character of the cleaned text and of its end."""
    if cleaned == text:
        return list(range(len(text) + 1))
    offsets: list[int] = []
    at = 0
    for match in LINE_BREAK.finditer(text):  # each became one space
        offsets += [*range(at, match.start()), match.start()]
        at = match.end()
    return [*offsets, *range(at, len(text) + 1)]


def _by_word(text: Text, tokens: Sequence[_Token], weights: Sequence[float]) -> list[Word]:
    """Sum the tokens' weights by word; those of special tokens are 0: baseline and text agree."""
    texts = [text] if isinstance(text, str) else text
    found: dict[tuple[int, int], list[Any]] = {}
    for token, weight in zip(tokens, weights, strict=True):
        start, end = token.span
        if token.word is None or start == end:
            continue
        entry = found.setdefault((token.input, token.word), [token.input, start, end, 0.0])
        entry[1], entry[2] = min(entry[1], start), max(entry[2], end)
        entry[3] += weight
    return [
        Word(texts[index][start:end], start, end, round(weight, 6), index)
        for index, start, end, weight in sorted(found.values())
    ]
