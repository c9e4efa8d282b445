"""From raw strings to a model's input ids, the same in fine-tuning and in inference.

A text that is longer than the model's input keeps its head and its tail: reviews name their subject
at the beginning and their verdict at the end (Sun et al., arXiv 1905.05583, section 5.3.1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.cluster.internals.data import ordered_execution
from raybert.data.keyed import I64
from raybert.data.tokenizer import Tokenizer

_BATCH_TEXTS = 1000
# Only one way to match any run of spaces: with two, a text of spaces alone would take minutes.
LINE_BREAK = re.compile(r"<\s*br\s*(?:/\s*)?>", re.IGNORECASE)


def replace_line_breaks(text: str, html_breaks: str) -> str:
    """Replace HTML line breaks by spaces if `html_breaks` is "space"; "keep" changes nothing."""
    return LINE_BREAK.sub(" ", text) if html_breaks == "space" and "<" in text else text


class Shortened(NamedTuple):
    """Texts as a model reads them."""

    rows: list[npt.NDArray[Any]]  # token ids of each
    is_cut: list[bool]  # whether a text was longer


Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # ids of two texts, without special tokens


@dataclass(frozen=True)
class Preprocessing:
    """How a raw text becomes a model's input; stored in the model's directory."""

    seq_len: int  # tokens at most, special tokens included
    head_tokens: int  # of a longer text: tokens kept from its beginning; the rest are its last ones
    html_breaks: str = "space"

    @classmethod
    def read(cls, values: dict[str, Any], max_seq_len: int) -> Preprocessing:
        """Read the settings of a model directory; by default, texts are cut at `max_seq_len`."""
        seq_len = min(int(values.get("seq_len", max_seq_len)), max_seq_len)
        return cls(
            seq_len=seq_len,
            head_tokens=int(values.get("head_tokens", seq_len)),
            html_breaks=str(values.get("html_breaks", "space")),
        )

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Shortened:
        """Turn raw texts into ids, [up to seq_len] each."""
        cleaned = [self.clean(text) for text in texts]
        whole = tokenizer.encode(cleaned).split()
        return Shortened([self.shorten(ids) for ids in whole], [self.cuts(ids) for ids in whole])

    def encode_pairs(
        self, tokenizer: Tokenizer, firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[Pair]:
        """Turn pairs of raw texts into their ids without special tokens, not shortened."""
        texts = [self.clean(text) for text in (*firsts, *seconds)]
        before, after = map(len, tokenizer.template)
        ids = [ids[before : len(ids) - after] for ids in tokenizer.encode(texts).split()]
        return list(zip(ids[: len(firsts)], ids[len(firsts) :], strict=True))

    def join_pair(self, tokenizer: Tokenizer, pair: Pair) -> npt.NDArray[Any]:
        """The input ids of a pair, [up to seq_len]: `[CLS] a [SEP] b [SEP]`.

        The end of the longer text is removed, as `tokenizers` does it with longest_first.
        """
        template = tokenizer.pair_template
        kept = kept_of_pair(len(pair[0]), len(pair[1]), self.seq_len - template.length)
        first, second = pair[0][: kept[0]], pair[1][: kept[1]]
        parts = (template.before, first, template.between, second, template.after)
        return np.concatenate([np.asarray(part, first.dtype) for part in parts])

    def clean(self, text: str) -> str:
        """Return a text as the tokenizer reads it."""
        return replace_line_breaks(text, self.html_breaks)

    def cuts(self, ids: npt.NDArray[Any]) -> bool:
        """Whether `shorten` removes any of ids."""
        return len(ids) > self.seq_len

    def cuts_pair(self, tokenizer: Tokenizer, pair: Pair) -> bool:
        """Whether `join_pair` removes any of a pair's ids."""
        return len(pair[0]) + len(pair[1]) > self.seq_len - tokenizer.pair_template.length

    def shorten(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Remove the middle of ids [n] that are too long; the closing special token stays."""
        if not self.cuts(ids):
            return ids
        head = min(max(1, self.head_tokens), self.seq_len - 1)
        return np.concatenate([ids[:head], ids[len(ids) - (self.seq_len - head) :]])


def kept_of_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts fit into `room` tokens."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if shorter <= room // 2:
        return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
    half = room // 2
    return (half, room - half) if first <= second else (room - half, half)


def pad(rows: Sequence[npt.NDArray[Any]], pad_id: int) -> tuple[I64, npt.NDArray[np.bool_] | None]:
    """Stack rows of ids, padded to the longest one: int64 [n, longest], at least one column.

    The second result is the attention mask, bool, False at padding; None: no padding.
    """
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max(initial=1))
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.arange(width) < lengths[:, None]
    ids[mask] = np.concatenate(rows)
    return ids, None if mask.all() else mask


def tokenize(texts: pa.ChunkedArray, tokenizer: Tokenizer, how: Preprocessing) -> Shortened:
    """Turn texts into ids, one array per text, in their order."""
    import ray

    if not ray.is_initialized() or len(texts) < 2 * _BATCH_TEXTS:
        return how.encode(tokenizer, texts.to_pylist())
    with ordered_execution():
        # The read tasks contain their rows, so no block waits in the object store.
        tables = [
            pa.table({"text": texts.slice(begin, _BATCH_TEXTS).combine_chunks()})
            for begin in range(0, len(texts), _BATCH_TEXTS)
        ]
        dataset = ray.data.from_arrow(tables).map_batches(
            _encode, fn_args=(tokenizer, how), batch_size=None, batch_format="pyarrow"
        )
        rows, is_cut = [], []
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows += [ids.values.to_numpy() for chunk in table["input_ids"].chunks for ids in chunk]
            is_cut += table["is_cut"].to_pylist()
        return Shortened(rows, is_cut)


def _encode(table: pa.Table, tokenizer: Tokenizer, how: Preprocessing) -> pa.Table:
    rows, is_cut = how.encode(tokenizer, table["text"].to_pylist())
    return pa.table({"input_ids": pa.array(rows, pa.list_(pa.uint32())), "is_cut": is_cut})
