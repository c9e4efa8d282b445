"""Pack documents into rows: concatenated with their special tokens, split at `seq_len`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class RowWriter(Protocol):
    """Receives the packed rows."""

    def append(self, input_ids: npt.NDArray[Any], word_starts: npt.NDArray[np.bool_]) -> None:
        """Append rows: ids and word starts (bool), [n, seq_len] each."""


class Packer:
    """Packs a stream of tokens into rows, which do not depend on how `add` divides the stream."""

    def __init__(self, writer: RowWriter, *, seq_len: int, pad_id: int, vocab_size: int) -> None:
        """Start with no tokens; `writer` receives full rows as soon as there are any."""
        self._writer, self._seq_len, self._pad_id = writer, seq_len, pad_id
        self._ids: npt.NDArray[Any] = np.zeros(0, np.uint16)
        self._starts = np.zeros(0, np.bool_)
        self.documents = 0
        self.tokens = 0  # without padding
        self.counts = np.zeros(vocab_size, np.int64)  # [V], of every id, without padding

    def add(
        self, ids: npt.NDArray[Any], word_starts: npt.NDArray[np.bool_], documents: int
    ) -> None:
        """Append the tokens of complete documents: ids [n], word_starts [n]."""
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
        # Copies, because a view would keep the whole block in memory.
        self._ids, self._starts = ids[whole:].copy(), word_starts[whole:].copy()

    def close(self) -> None:
        """Write the last row, padded."""
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
    """The loss in nats per token of a model that predicts each token by its frequency.

    Args:
        train: counts by id [V], which give the add-one smoothed distribution.
        heldout: counts by id [V] of the tokens to predict.
        special: bool [V], ids left out of both.

    Returns:
        The mean negative log-likelihood, or None if there is no token to predict.
    """
    smoothed, scored = train[~special] + 1.0, heldout[~special]
    if not scored.sum():
        return None
    return float(-(scored * np.log(smoothed / smoothed.sum())).sum() / scored.sum())
