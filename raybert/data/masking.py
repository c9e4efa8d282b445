"""Masking for masked language modeling: which tokens are predicted, and what replaces them.

Every draw is keyed by (seed, epoch, row id, position), so masks do not depend on the worker or the
time. Of the chosen tokens, `mask_share`, by default 80%, become [MASK], `random_share` 10% a random
token, and the rest is kept (Devlin et al., arXiv 1810.04805, section 3.1). Spans follow SpanBERT
(Joshi et al., arXiv 1907.10529, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from raybert.config import Settings
from raybert.data.corpus.parts import Rows
from raybert.data.keyed import I64, key_of, keyed_uniform

IGNORE_INDEX = -100

_SPAN_P = 0.2  # parameter of the geometric distribution of span lengths, in words
_MAX_SPAN = 10  # words


class MaskingConfig(Settings):
    """How tokens are masked in pretraining. Evaluation always masks 15% single tokens."""

    strategy: Literal["tokens", "words", "spans"] = Field(
        "tokens", description="what is masked together: single tokens, whole words, spans of words"
    )
    mask_rate: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of the tokens that is predicted; BERT uses 0.15; small models and short "
        "runs learn faster with more (arXiv 2202.08005)",
    )
    mask_rate_end: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="mask rate at the end of the run, reached linearly; null: constant",
    )
    mask_share: float = Field(
        0.8, ge=0, le=1, description="share of the predicted tokens replaced by [MASK]"
    )
    random_share: float = Field(0.1, ge=0, le=1, description="share replaced by a random token")

    @model_validator(mode="after")
    def _shares_fit(self) -> MaskingConfig:
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"mask_share={self.mask_share} and random_share={self.random_share} add up to more "
                "than 1; lower one of them"
            )
        return self

    def rate(self, progress: float) -> float:
        """The mask rate after a fraction `progress` (0 to 1) of the run."""
        end = self.mask_rate if self.mask_rate_end is None else self.mask_rate_end
        return self.mask_rate + (end - self.mask_rate) * min(1.0, max(0.0, progress))


EVALUATION = MaskingConfig(strategy="tokens", mask_rate=0.15)


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs of a tokenizer."""

    mask_id: int
    special: npt.NDArray[np.bool_]  # [V], True for ids that are neither predicted nor drawn


def mask_rows(
    rows: Rows,
    row_ids: I64,
    epoch: int,
    rate: float,
    *,
    config: MaskingConfig,
    vocabulary: Vocabulary,
    seed: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Mask rows [n, T] with the ids `row_ids` [n]; `rate` is the share of predicted tokens.

    Returns input_ids, int32 [n, T], with the chosen tokens replaced, and labels, int32 [n, T]: the
    true ids where a token was chosen, IGNORE_INDEX elsewhere.
    """
    ids = rows.input_ids.astype(np.int32)  # [n, T]
    at = ([[epoch]], row_ids[:, None], np.arange(ids.shape[1]))
    draw = keyed_uniform(key_of("choose", seed), *at)  # [n, T]
    if config.strategy == "tokens":
        chosen = draw < np.float32(rate)
    elif config.strategy == "words":
        of_word = np.take_along_axis(draw, _first_of_word(rows.word_starts), axis=1)
        chosen = of_word < np.float32(rate)
    else:
        length = keyed_uniform(key_of("length", seed), *at)
        chosen = _spans(rows.word_starts, draw, length, rate)
    chosen &= ~vocabulary.special[ids]  # [n, T]

    labels = np.where(chosen, ids, np.int32(IGNORE_INDEX))  # [n, T]
    n, t = np.nonzero(chosen)  # [M] each: the chosen positions
    where = ([epoch], row_ids[n], t)
    action = keyed_uniform(key_of("replace", seed), *where)
    ordinary = np.flatnonzero(~vocabulary.special)  # the ids of random replacement
    drawn = keyed_uniform(key_of("random", seed), *where)
    random_ids = ordinary[(drawn * np.float32(len(ordinary))).astype(np.int64) % len(ordinary)]
    replaced = np.where(action < config.mask_share + config.random_share, random_ids, ids[n, t])
    ids[n, t] = np.where(action < config.mask_share, vocabulary.mask_id, replaced)
    return ids, labels


def predicted(labels: npt.NDArray[Any], size: int = 0) -> tuple[I64, I64]:
    """The predicted positions of labels [n, T] in the flattened batch, and their true ids.

    Both are int64 [M], and with a `size` padded to a multiple of it: with any positions, whose ids
    are IGNORE_INDEX.
    """
    flat = labels.ravel()
    positions = np.flatnonzero(flat != IGNORE_INDEX).astype(np.int64)
    ids = flat[positions].astype(np.int64)
    if size:
        padding = max(size, -(-len(positions) // size) * size) - len(positions)
        positions = np.concatenate([positions, np.arange(padding) % flat.size])
        ids = np.concatenate([ids, np.full(padding, IGNORE_INDEX)])
    return positions, ids


def usual_size(tokens: int, rate: float) -> int:
    """How many of so many tokens are predicted at most: six deviations of independent draws."""
    most = tokens * rate + 6 * math.sqrt(tokens * rate * (1 - rate))
    return 64 * math.ceil(min(tokens, most) / 64)


def document_lengths(starts: npt.NDArray[np.bool_], padding: npt.NDArray[np.bool_]) -> list[int]:
    """The lengths of all documents in rows [n, T], one row after the other.

    A document begins at each of `starts` and with each row; the padding of a row is another.
    """
    begins = starts.copy()
    begins[:, 0] = True
    begins[:, 1:] |= padding[:, 1:] & ~padding[:, :-1]
    return [int(length) for length in np.diff(np.flatnonzero(begins), append=begins.size)]


def _first_of_word(word_starts: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """For each token of [n, T], the position at which its word starts; 0 if none starts before."""
    positions = np.where(word_starts, np.arange(word_starts.shape[1]), 0)
    return np.maximum.accumulate(positions, axis=1)


def _spans(
    word_starts: npt.NDArray[np.bool_],
    draw: npt.NDArray[np.float32],
    length: npt.NDArray[np.float32],
    rate: float,
) -> npt.NDArray[np.bool_]:
    """Choose spans of whole words, bool [n, T], that cover a share `rate` on average."""
    starts = word_starts.copy()
    starts[:, 0] = True
    # [n, T], the number of each token's word in its row
    word: npt.NDArray[np.int64] = np.cumsum(starts, axis=1) - 1
    n, t = np.nonzero(starts)
    # A span starts at each word with the probability that covers the wanted share. It is
    # 1 + floor(log(1 - u) / log(1 - p)) words long, at most 10.
    lengths = 1 + np.floor(np.log1p(-length[n, t]) / np.log1p(-_SPAN_P)).astype(np.int64)
    begins = draw[n, t] < _start_probability(rate)
    span: npt.NDArray[np.int64] = np.zeros(starts.shape, np.int64)
    span[n, word[n, t]] = np.where(begins, np.minimum(lengths, _MAX_SPAN), 0)
    covered = span > 0
    for back in range(1, min(_MAX_SPAN, span.shape[1])):
        covered[:, back:] |= span[:, :-back] > back
    return np.take_along_axis(covered, word, axis=1)


def _start_probability(rate: float) -> np.float64:
    """Solve 1 - prod_d (1 - q P(length > d)) = rate for q by bisection."""
    longer = (1 - _SPAN_P) ** np.arange(_MAX_SPAN)  # P(length > d)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        is_low = 1 - np.prod(1 - middle * longer) < rate
        low, high = (middle, high) if is_low else (low, middle)
    return np.float64(high)
