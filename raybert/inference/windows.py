"""Overlapping windows over texts that are longer than the model, and the mean of their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[Any]  # token ids of a text or of a window, [tokens]

#: A quarter of a window is also in the next one: a phrase that one of them cuts is whole in the
#: other.
OVERLAP = 4


def windows(ids: Row, seq_len: int) -> list[Row]:
    """Split a text's ids into windows of at most `seq_len` tokens that cover it.

    Each window begins and ends with the text's first and last id, the special tokens. A text that
    fits is one window; all windows of a longer text have `seq_len` tokens, at least 8.
    """
    if len(ids) <= seq_len:
        return [ids]
    first, inner, last = ids[:1], ids[1:-1], ids[-1:]
    size = seq_len - 2
    stride = size - size // OVERLAP
    starts = [*range(0, len(inner) - size, stride), len(inner) - size]
    return [np.concatenate([first, inner[a : a + size], last]) for a in starts]


def pool(logits: npt.NDArray[np.float32], counts: Sequence[int]) -> npt.NDArray[np.float32]:
    """Average logits [windows, labels] over each text's windows, of which it has 1 or more.

    `counts` has their number by text; the result is [texts, labels].
    """
    if len(counts) == len(logits):  # one window a text
        return logits
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(logits, starts, axis=0)
    return np.asarray(sums / np.array(counts, np.float32)[:, None], np.float32)
