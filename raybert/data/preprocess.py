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

from raybert.data.keyed import I64, Permutation, key_of
from raybert.data.sources.files import LINE_BREAK
from raybert.data.tokenizer import Ragged, Tokenizer

# Long enough that batches hold texts of equal length, short enough that an epoch stays shuffled.
_BATCHES_SORTED_TOGETHER = 50


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


@dataclass(frozen=True)
class LengthOrder:
    """The order of labelled texts: shuffled by a key, texts of like length in one batch."""

    lengths: npt.NDArray[np.int64]  # [rows]
    global_batch_size: int
    micro_batch_size: int
    seed: int

    @property
    def micro_batches_per_step(self) -> int:
        """How many micro-batches make up a global batch."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every row once; the last one may be smaller."""
        return max(1, -(-len(self.lengths) // self.global_batch_size))

    def epoch(self, epoch: int) -> I64:
        """The rows of an epoch in the order of their use, int64 [rows]."""
        rows = Permutation(len(self.lengths), key_of("texts", self.seed, epoch))(
            np.arange(len(self.lengths))
        )
        size = self.global_batch_size
        together = size * _BATCHES_SORTED_TOGETHER
        for begin in range(0, len(rows), together):
            part = rows[begin : begin + together]
            rows[begin : begin + together] = part[np.argsort(self.lengths[part], kind="stable")]
        whole = len(rows) // size
        order = Permutation(max(1, whole), key_of("batches", self.seed, epoch))(np.arange(whole))
        batches = rows[: whole * size].reshape(whole, size)[order].ravel()
        return np.concatenate([batches, rows[whole * size :]])

    def micro_batch(self, rows: I64, step: int, slot: int) -> I64:
        """A slot's rows of a step, of an epoch's `rows`."""
        begin = step % self.steps_per_epoch * self.global_batch_size
        batch = rows[begin : begin + self.global_batch_size]
        # An epoch's last batch may be short: its rows are spread over the slots all the same.
        a, b = (len(batch) * s // self.micro_batches_per_step for s in (slot, slot + 1))
        return batch[a:b]
