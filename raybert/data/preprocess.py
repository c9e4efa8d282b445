"""From raw strings to the ids that a model reads: the same way in training and in every answer.

What a text past the model's length keeps is its head and its tail: a review's verdict stands at its
end, its subject at its beginning (Sun et al., arXiv 1905.05583, section 5.3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.data.keyed import I64
from raybert.data.sources.files import LINE_BREAK
from raybert.data.tokenizer import Ragged, Tokenizer


@dataclass(frozen=True)
class Preprocessing:
    """What turns a raw text into a model's input; kept in the model's directory."""

    seq_len: int  # tokens at most, special ones included
    head_tokens: int  # of a longer text, so many of its first tokens; the rest are its last ones
    html_breaks: str = "space"

    @classmethod
    def read(cls, values: dict[str, Any], max_seq_len: int) -> Preprocessing:
        """Read what a model directory says; models of others cut texts at their length."""
        seq_len = min(int(values.get("seq_len", max_seq_len)), max_seq_len)
        return cls(
            seq_len=seq_len,
            head_tokens=int(values.get("head_tokens", seq_len)),
            html_breaks=str(values.get("html_breaks", "space")),
        )

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Turn raw texts into ids, [up to seq_len] each."""
        cleaned = [self.clean(text) for text in texts]
        return [self.shorten(ids) for ids in split(tokenizer.encode(cleaned))]

    def clean(self, text: str) -> str:
        """A text as the tokenizer is to read it."""
        if self.html_breaks == "space" and "<" in text:
            return LINE_BREAK.sub(" ", text)
        return text

    def shorten(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Cut the middle out of ids [n] that are too long; the closing special token stays."""
        if len(ids) <= self.seq_len:
            return ids
        head = min(max(1, self.head_tokens), self.seq_len - 1)
        return np.concatenate([ids[:head], ids[len(ids) - (self.seq_len - head) :]])


def split(ragged: Ragged) -> list[npt.NDArray[Any]]:
    """The texts' ids, one array a text."""
    bounds = ragged.offsets
    return [ragged.values[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def pad(rows: Sequence[npt.NDArray[Any]], pad_id: int) -> tuple[I64, npt.NDArray[np.bool_] | None]:
    """Stack rows of ids to the longest one.

    Returns:
        input_ids: int64 [n, longest].
        attention_mask: bool [n, longest], False at padding; None where there is no padding.
    """
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max(initial=1))
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.arange(width) < lengths[:, None]
    ids[mask] = np.concatenate(rows)
    return ids, None if mask.all() else mask
