"""Tokenize by whole words that were tokenized before: the same ids, many times faster.

A normalizer and a pre-tokenizer that never look across a space make the ids of a text the ids of
its space-separated pieces, one after the other. Language repeats itself (a million words of reviews
hold some forty thousand different pieces), so nearly every piece is a dictionary look-up and only
new ones go through `tokenizers`, whose WordPiece has no cache of its own. Which components keep to
that rule is a closed list; any other tokenizer takes the ordinary path. A property test compares
the two on arbitrary Unicode.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import chain, filterfalse
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HfTokenizer

# Characterwise, or bounded by starters such as the space, in every case.
_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"}
_PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_MODELS = {"WordPiece", "WordLevel"}

_ENTRIES = 150_000  # a generation, about 30 MB; there are two
_LONGEST = 48  # characters; longer pieces (URLs, unspaced scripts) hardly ever come again


def splits_at_spaces(spec: dict[str, Any], strip_pattern: str | None = None) -> bool:
    """Whether a `tokenizer.json` tokenizes the pieces between spaces independently.

    Args:
        spec: the parsed file.
        strip_pattern: a regular expression of single characters that a Replace may remove.
    """

    def normalizer_is_local(part: dict[str, Any] | None) -> bool:
        if part is None or part["type"] in _NORMALIZERS:
            return True
        if part["type"] == "Sequence":
            return all(normalizer_is_local(inner) for inner in part["normalizers"])
        return bool(
            part["type"] == "Replace"
            and part["pattern"] == {"Regex": strip_pattern}
            and part["content"] == ""
        )

    tokens = spec.get("added_tokens") or []
    return (
        spec["model"].get("type") in _MODELS
        and (spec.get("pre_tokenizer") or {}).get("type") in _PRE_TOKENIZERS
        and normalizer_is_local(spec.get("normalizer"))
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"]
            or any(character.isspace() for character in token["content"])
            for token in tokens
        )
    )  # fmt: skip


class WordCache:
    """The ids of pieces seen so far, as bytes ready to be joined. Safe for threads."""

    def __init__(self, tokenizer: HfTokenizer, dtype: npt.DTypeLike) -> None:
        """Start empty; ids are kept as `dtype`."""
        self._tokenizer, self._dtype = tokenizer, np.dtype(dtype)
        self._ids: dict[str, bytes] = {"": b""}
        self._older: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Tokenize texts, without special tokens around them; each one's ids as bytes."""
        pieces = [text.split(" ") for text in texts]
        with self._lock:
            return self._join(pieces)

    def _join(self, pieces: list[list[str]]) -> list[bytes]:
        new = self._unknown(pieces)
        if len(self._ids) + len(new) > _ENTRIES and len(self._ids) > 1:
            # What is still in use moves over to the new generation; the rest goes with the next.
            self._older, self._ids = self._ids, {"": b""}
            new = self._unknown(pieces)
        known = new & self._older.keys()
        for word in known:
            self._ids[word] = self._older[word]
        new -= known
        if new:
            self._learn(sorted(new))
        look_up = self._ids.__getitem__
        joined = [b"".join(map(look_up, words)) for words in pieces]
        for word in new:
            if len(word) > _LONGEST:
                del self._ids[word]
        return joined

    def _unknown(self, pieces: list[list[str]]) -> set[str]:
        # One look-up a piece: the difference of a set and a dictionary's keys walks through all of
        # the keys, which takes longer than a lone text.
        return set(filterfalse(self._ids.__contains__, chain.from_iterable(pieces)))

    def _learn(self, words: Sequence[str]) -> None:
        for begin in range(0, len(words), 4096):  # encodings are large: some 100 times their text
            batch = words[begin : begin + 4096]
            for word, ids in zip(batch, plain_ids(self._tokenizer, batch), strict=True):
                self._ids[word] = np.array(ids, self._dtype).tobytes()


def plain_ids(
    tokenizer: HfTokenizer, texts: Sequence[str], *, special: bool = False
) -> Iterable[list[int]]:
    """The ids of texts straight from `tokenizers`."""
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=special):
        yield encoding.ids
