"""Texts past the model's length, read in windows that overlap, with their scores pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[Any]  # a text's ids, or those of a window of it, [tokens]

OVERLAP = 4  # a quarter of a window is also in the next one, so that no phrase is cut for both


def windows(ids: Row, seq_len: int) -> list[Row]:
    """Cut a text's ids into windows of at most `seq_len` tokens that cover all of it.

    Each window has the text's first and last id around it, which are the special ones. A text that
    fits is its own single window; all windows of a longer one are full.

    Args:
        ids: [n], special tokens included.
        seq_len: at least 8.
    """
    if len(ids) <= seq_len:
        return [ids]
    first, inner, last = ids[:1], ids[1:-1], ids[-1:]
    size = seq_len - 2
    stride = size - size // OVERLAP
    starts = [*range(0, len(inner) - size, stride), len(inner) - size]
    return [np.concatenate([first, inner[a : a + size], last]) for a in starts]


def pool(logits: npt.NDArray[np.float32], counts: Sequence[int]) -> npt.NDArray[np.float32]:
    """Average the logits of each text's windows.

    Args:
        logits: [windows, labels], the texts' windows one after the other.
        counts: windows of each text, at least 1.

    Returns:
        [texts, labels].
    """
    if len(counts) == len(logits):  # one window each
        return logits
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(logits, starts, axis=0)
    return np.asarray(sums / np.array(counts, np.float32)[:, None], np.float32)
