"""Sentences with a mask from a corpus's held-out text, which show what a model has learned."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raybert.data.corpus.parts import PartReader, Rows
from raybert.data.tokenizer import Tokenizer

COUNT = 3
_SHORTEST, _LONGEST = 6, 24  # tokens of an example
_ROWS = 64  # that are looked at, evenly spaced


class MaskExample(NamedTuple):
    """A text with a mask, and the masked word; None: it is the user's sentence."""

    text: str
    expected: str | None = None


def heldout_examples(reader: PartReader, tokenizer: Tokenizer) -> list[MaskExample]:
    """A few texts of held-out rows in which a whole word is masked, the same in every run."""
    count = min(reader.rows, _ROWS)
    rows = reader.read_rows(np.arange(count, dtype=np.int64) * reader.rows // max(1, count))
    found: list[MaskExample] = []
    for row in range(count):
        example = _example(rows, row, tokenizer)
        if example is not None and example not in found:
            found.append(example)
    return found[:: max(1, len(found) // COUNT)][:COUNT]


def _example(rows: Rows, row: int, tokenizer: Tokenizer) -> MaskExample | None:
    """An example from the first document of a row that is long enough; None: there is none."""
    ids, starts = rows.input_ids[row].astype(np.int64), rows.word_starts[row]
    unusable = tokenizer.is_special[ids]
    ends = np.flatnonzero(np.append(unusable, True))
    begin = 0
    for end in ends.tolist():
        if end - begin >= _SHORTEST:
            shown = slice(begin, min(end, begin + _LONGEST))
            example = _mask_a_word(ids[shown], starts[shown], tokenizer)
            if example is not None:
                return example
        begin = end + 1
    return None


def _mask_a_word(
    ids: npt.NDArray[np.int64], starts: npt.NDArray[np.bool_], tokenizer: Tokenizer
) -> MaskExample | None:
    """Mask the word of one token that is nearest to the middle."""
    is_whole = starts & np.append(starts[1:], False)  # the next token begins another word
    middle = len(ids) // 2
    for at in sorted(np.flatnonzero(is_whole).tolist(), key=lambda at: abs(at - middle)):
        word = _decode(tokenizer, ids[at : at + 1])
        if word.isalpha():
            before, after = _decode(tokenizer, ids[:at]), _decode(tokenizer, ids[at + 1 :])
            return MaskExample(f"{before} {tokenizer.mask_token} {after}".strip(), word)
    return None


def _decode(tokenizer: Tokenizer, ids: npt.NDArray[Any]) -> str:
    return str(tokenizer.hf.decode(ids.tolist())).strip()
