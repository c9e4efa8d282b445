"""Documents into rows: end to end, each with its special tokens, cut at `seq_len`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class RowWriter(Protocol):
    """What takes the packed rows."""

    def append(self, input_ids: npt.NDArray[Any], word_starts: npt.NDArray[np.bool_]) -> None:
        """Append rows: ids [n, seq_len], and where words start, bool [n, seq_len]."""


class Packer:
    """Packs a stream of tokens into rows. Where the stream was cut into calls leaves no trace."""

    def __init__(self, writer: RowWriter, *, seq_len: int, pad_id: int, vocab_size: int) -> None:
        """Start with no tokens; full rows go to `writer` as they come."""
        self._writer, self._seq_len, self._pad_id = writer, seq_len, pad_id
        self._ids: npt.NDArray[Any] = np.zeros(0, np.uint16)
        self._starts = np.zeros(0, np.bool_)
        self.documents = 0
        self.tokens = 0  # padding not counted
        self.counts = np.zeros(vocab_size, np.int64)  # of every id, padding not counted

    def add(
        self, ids: npt.NDArray[Any], word_starts: npt.NDArray[np.bool_], documents: int
    ) -> None:
        """Append the tokens of whole documents: ids [n], word_starts [n]."""
        self.documents += documents
        self.tokens += len(ids)
        self.counts += np.bincount(ids, minlength=len(self.counts))
        if len(self._ids):
            ids = np.concatenate([self._ids, ids])
            word_starts = np.concatenate([self._starts, word_starts])
        whole = len(ids) - len(ids) % self._seq_len
        if whole:
            shape = (-1, self._seq_len)
            self._writer.append(ids[:whole].reshape(shape), word_starts[:whole].reshape(shape))
        # Copies: a view would keep the whole block alive.
        self._ids, self._starts = ids[whole:].copy(), word_starts[whole:].copy()

    def close(self) -> None:
        """Write the last row, filled up with padding."""
        if not len(self._ids):
            return
        fill = self._seq_len - len(self._ids)
        ids = np.concatenate([self._ids, np.full(fill, self._pad_id, self._ids.dtype)])
        starts = np.concatenate([self._starts, np.ones(fill, np.bool_)])
        self._writer.append(ids[None], starts[None])
        self._ids, self._starts = self._ids[:0], self._starts[:0]


def unigram_loss(
    train: npt.NDArray[np.int64], heldout: npt.NDArray[np.int64], special: npt.NDArray[np.bool_]
) -> float | None:
    """The loss in nats a token of a model that knows only how frequent each token is.

    Args:
        train: counts by id [V], from which the add-one smoothed distribution is made.
        heldout: counts by id [V] of what it is scored on.
        special: bool [V], ids left out of both.

    Returns:
        The mean negative log-likelihood, or None where there is nothing to score.
    """
    smoothed, scored = train[~special] + 1.0, heldout[~special]
    if not scored.sum():
        return None
    return float(-(scored * np.log(smoothed / smoothed.sum())).sum() / scored.sum())
