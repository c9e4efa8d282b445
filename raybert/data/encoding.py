"""Token ids and word starts of many texts, concatenated.

`encode_plain` computes them with `tokenizers`; `word_cache` is a faster way to the same ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HfTokenizer


class Ragged(NamedTuple):
    """The ids of texts, concatenated: text i has values[offsets[i]:offsets[i + 1]]."""

    values: npt.NDArray[Any]  # [sum of lengths], the tokenizer's dtype
    offsets: npt.NDArray[np.int64]  # [B + 1]
    word_starts: npt.NDArray[np.bool_]  # [sum of lengths], True where a word starts

    def split(self) -> list[npt.NDArray[Any]]:
        """Return the ids as one array per text."""
        return [self.values[a:b] for a, b in itertools.pairwise(self.offsets)]


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def offsets_of(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The offsets [B + 1] of concatenated texts of these lengths [B]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def word_start_table(spec: dict[str, Any], vocab_size: int) -> npt.NDArray[np.bool_] | None:
    """For each id, bool [V], whether it starts a word; None where that depends on the text.

    Args:
        spec: a parsed `tokenizer.json`.
        vocab_size: V.
    """
    model = spec["model"]
    if model.get("type") == "WordLevel":
        return np.ones(vocab_size, np.bool_)
    if model.get("type") != "WordPiece":
        return None
    prefix = model.get("continuing_subword_prefix", "##")
    if not prefix:
        return None
    table = np.ones(vocab_size, np.bool_)
    for token, index in model["vocab"].items():
        table[index] = not token.startswith(prefix) or token == prefix
    return table


def template_ids(hf: HfTokenizer) -> tuple[list[int], list[int]]:
    """The special ids that a tokenizer's template sets before and after a text."""
    empty = hf.encode("").ids
    with_text = hf.encode("a").ids
    text = hf.encode("a", add_special_tokens=False).ids
    before = next(n for n in range(len(empty) + 1) if with_text == empty[:n] + text + empty[n:])
    return empty[:before], empty[before:]


def encode_plain(
    hf: HfTokenizer,
    texts: Sequence[str],
    special: bool,
    dtype: npt.DTypeLike,
    starts_by_id: npt.NDArray[np.bool_] | None,
) -> Ragged:
    """Turn texts into ids and word starts by `tokenizers`, without a cache.

    Args:
        hf: the tokenizer.
        texts: raw strings.
        special: whether to add the template's special tokens.
        dtype: of the ids.
        starts_by_id: the `word_start_table`; None: the encodings' word numbers are used.
    """
    ids: list[npt.NDArray[Any]] = []
    starts: list[npt.NDArray[np.bool_]] = []
    if starts_by_id is not None:
        fast = hf.encode_batch_fast(list(texts), add_special_tokens=special)
        ids = [np.array(encoding.ids, dtype) for encoding in fast]
        starts = [starts_by_id[one] for one in ids]
    else:  # only the slower encoding has the words' numbers
        for encoding in hf.encode_batch(list(texts), add_special_tokens=special):
            ids.append(np.array(encoding.ids, dtype))
            words = np.array([-1 if w is None else w for w in encoding.word_ids], np.int64)
            starts.append((np.diff(words, prepend=-2) != 0) | (words < 0))
    lengths = np.array([len(one) for one in ids], np.int64)
    return Ragged(
        np.concatenate(ids or [np.zeros(0, dtype)]),
        offsets_of(lengths),
        np.concatenate(starts or [np.zeros(0, np.bool_)]),
    )
