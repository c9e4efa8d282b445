"""Token ids and word starts of many texts, concatenated: by `tokenizers`, or from a cache of words.

If normalizer and pre-tokenizer never depend on text across a space, the ids of a text are the ids
of its space-separated pieces, concatenated. Words repeat (a million words of reviews have some
forty thousand different pieces), so nearly every piece is a dictionary look-up, and only new ones
go through `tokenizers`, whose WordPiece has no cache: the same ids, many times faster. The
components with this property are a closed list; any other tokenizer takes the plain path.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from itertools import chain, filterfalse
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
    """For each id, bool [V], whether it starts a word; None where that depends on the text."""
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


class PairTemplate(NamedTuple):
    """The special ids that a tokenizer's template sets around two texts."""

    before: list[int]
    between: list[int]
    after: list[int]

    @property
    def length(self) -> int:
        """All special tokens of a pair."""
        return len(self.before) + len(self.between) + len(self.after)


def pair_template(hf: HfTokenizer) -> PairTemplate | None:
    """The template of a pair; None where the tokenizer sets nothing between its texts."""
    encoding = hf.encode("a", "a")
    texts = [encoding.sequence_ids.index(i) for i in (0, 1) if i in encoding.sequence_ids]
    if len(texts) < 2:
        return None
    count = encoding.sequence_ids.count(0)
    before, second = texts
    parts = encoding.ids[:before], encoding.ids[before + count : second]
    template = PairTemplate(*parts, encoding.ids[second + encoding.sequence_ids.count(1) :])
    return template if template.between else None


def undefined_special_tokens(processor: dict[str, Any] | None) -> list[str]:
    """The special tokens that the template of a `tokenizer.json` uses and does not define."""
    parts = [processor or {}, *(processor or {}).get("processors", ())]
    return [
        piece["SpecialToken"]["id"]
        for part in parts
        for piece in [*part.get("single", ()), *part.get("pair", ())]
        if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in part["special_tokens"]
    ]


def encode_plain(
    hf: HfTokenizer,
    texts: Sequence[str],
    dtype: npt.DTypeLike,
    starts_by_id: npt.NDArray[np.bool_] | None,
) -> Ragged:
    """Turn texts into ids and word starts by `tokenizers`, without a cache."""
    ids: list[npt.NDArray[Any]] = []
    starts: list[npt.NDArray[np.bool_]] = []
    if starts_by_id is not None:
        fast = hf.encode_batch_fast(list(texts))
        ids = [np.array(encoding.ids, dtype) for encoding in fast]
        starts = [starts_by_id[one] for one in ids]
    else:  # only the slower encoding has the words' numbers
        for encoding in hf.encode_batch(list(texts)):
            ids.append(np.array(encoding.ids, dtype))
            words = np.array([-1 if w is None else w for w in encoding.word_ids], np.int64)
            starts.append((np.diff(words, prepend=-2) != 0) | (words < 0))
    lengths = np.array([len(one) for one in ids], np.int64)
    return Ragged(
        np.concatenate(ids or [np.zeros(0, dtype)]),
        offsets_of(lengths),
        np.concatenate(starts or [np.zeros(0, np.bool_)]),
    )


# Each of these works on single characters, or stops at starters such as the space.
_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"}
_PRE_TOKENIZERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_MODELS = {"WordPiece", "WordLevel"}

_MAX_ENTRIES = 150_000  # of a generation, about 30 MB; there are two
_MAX_PIECE = 48  # characters; longer pieces (URLs, scripts without spaces) hardly ever repeat

# Keras' TextVectorization, `strip_punctuation`, as a class of single characters.
STRIP_PATTERN = r"""[!"#$%&()\*\+,\-\./:;<=>?@\[\\\]^_`{|}~']"""


def splits_at_spaces(spec: dict[str, Any]) -> bool:
    """Whether a parsed `tokenizer.json` tokenizes the pieces between spaces independently."""

    def normalizer_is_local(part: dict[str, Any] | None) -> bool:
        if part is None or part["type"] in _NORMALIZERS:
            return True
        if part["type"] == "Sequence":
            return all(normalizer_is_local(inner) for inner in part["normalizers"])
        return bool(
            part["type"] == "Replace"
            and part["pattern"] == {"Regex": STRIP_PATTERN}
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
    """The ids of the pieces seen so far, as bytes ready to be joined. Thread-safe."""

    def __init__(self, tokenizer: HfTokenizer, dtype: npt.DTypeLike) -> None:
        """Start empty; ids are stored as `dtype`."""
        self._tokenizer, self._dtype = tokenizer, np.dtype(dtype)
        self._ids: dict[str, bytes] = {"": b""}
        self._older: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Tokenize texts without special tokens; return the ids of each as bytes."""
        pieces = [text.split(" ") for text in texts]
        with self._lock:
            return self._join(pieces)

    def _join(self, pieces: list[list[str]]) -> list[bytes]:
        new = self._unknown(pieces)
        if len(self._ids) + len(new) > _MAX_ENTRIES and len(self._ids) > 1:
            # Pieces still in use move to the new generation; the others are dropped with the old
            # one.
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
            if len(word) > _MAX_PIECE:
                del self._ids[word]
        return joined

    def _unknown(self, pieces: list[list[str]]) -> set[str]:
        # One look-up per piece: the difference of a set and a dictionary's keys iterates over all
        # of the keys, which takes longer than tokenizing a single text.
        return set(filterfalse(self._ids.__contains__, chain.from_iterable(pieces)))

    def _learn(self, words: Sequence[str]) -> None:
        for begin in range(0, len(words), 4096):  # encodings take some 100 times their text
            batch = list(words[begin : begin + 4096])
            encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            for word, encoding in zip(batch, encodings, strict=True):
                self._ids[word] = np.array(encoding.ids, self._dtype).tobytes()
