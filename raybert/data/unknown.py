"""The share of a text that a vocabulary can't express: nothing is learned from that.

One unknown token may stand for a word or for a whole line, so characters are counted, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raybert.data.encoding import Ragged
from raybert.data.keyed import I64
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DataError

WARNED, REFUSED = 0.01, 0.2
_SAMPLE_CHARS = 1_000_000  # of which a share is measured


class UnknownCount(NamedTuple):
    """What of some texts is unknown, and of how much."""

    unknown_tokens: int = 0
    tokens: int = 0  # of text
    unknown_chars: int = 0
    chars: int = 0

    def plus(self, other: UnknownCount) -> UnknownCount:
        """The counts of both."""
        return UnknownCount(*map(sum, zip(self, other, strict=True)))

    @property
    def share(self) -> float | None:
        """The share of the tokens, or of the characters if it is larger; None: no tokens."""
        if not self.tokens:
            return None
        return max(self.unknown_tokens / self.tokens, self.unknown_chars / max(1, self.chars))


def text_tokens(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """For each id, bool [V], whether it stands for text, known or not."""
    table = ~tokenizer.is_special
    if tokenizer.unknown_id is not None:
        table[tokenizer.unknown_id] = True
    return table


def unknown_characters(texts: Sequence[str], encoded: Ragged, tokenizer: Tokenizer) -> I64:
    """How many characters of each text its unknown tokens stand for, [n]; `encoded`: its ids."""
    lost = np.zeros(len(texts), np.int64)
    if tokenizer.unknown_id is None:
        return lost
    at = np.flatnonzero(encoded.values == tokenizer.unknown_id)
    rows = np.unique(np.searchsorted(encoded.offsets, at, side="right") - 1).tolist()
    for begin in range(0, len(rows), 256):  # encodings take some 100 times their text
        some = rows[begin : begin + 256]
        found = tokenizer.hf.encode_batch([texts[row] for row in some], add_special_tokens=False)
        for row, encoding in zip(some, found, strict=True):
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            lost[row] = sum(e - b for index, (b, e) in spans if index == tokenizer.unknown_id)
    return lost


def count_unknown(texts: Sequence[str], encoded: Ragged, tokenizer: Tokenizer) -> UnknownCount:
    """Count what of texts is unknown; `encoded` are their ids."""
    counts = np.bincount(encoded.values, minlength=tokenizer.vocab_size)
    unknown_id = tokenizer.unknown_id
    return UnknownCount(
        unknown_tokens=0 if unknown_id is None else int(counts[unknown_id]),
        tokens=int(counts[text_tokens(tokenizer)].sum()),
        unknown_chars=int(unknown_characters(texts, encoded, tokenizer).sum()),
        chars=sum(map(len, texts)),
    )


def count_unknown_of_sample(texts: Sequence[str], tokenizer: Tokenizer) -> UnknownCount:
    """Count what is unknown of the first texts, of about a million characters."""
    counted, begin = UnknownCount(), 0
    while begin < len(texts) and counted.chars < _SAMPLE_CHARS:
        some = texts[begin : begin + 256]
        counted = counted.plus(count_unknown(some, tokenizer.encode(some), tokenizer))
        begin += len(some)
    return counted


def check_unknown(share: float | None, what: str, remedy: str) -> str | None:
    """Return a warning if a share is large; None: it is not.

    Raises:
        DataError: the share is so large that the model would see little of the text.
    """
    if share is None or share < WARNED:
        return None
    found = f"{share:.1%} of {what} is unknown to the tokenizer"
    if share >= REFUSED:
        raise DataError(f"{found}; {remedy}")
    return f"{found}: {remedy}"
