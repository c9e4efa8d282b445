"""A fine-tuned classifier for inference: raw texts in, logits or probabilities out.

On CPUs the texts of a batch are concatenated into one row, and each attends to itself only
(`attend_varlen`): no padding is computed, and apart from the rounding of matrix products a text's
scores do not depend on the other texts of its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raybert.data.preprocess import Preprocessing, pad
from raybert.data.tokenizer import Tokenizer
from raybert.inference.precision import build_model, resolve_precision
from raybert.model import huggingface
from raybert.storage.folder import Folder

Row = npt.NDArray[Any]  # token ids of a text or of a window, [tokens]

#: A quarter of a window is also in the next one, so that no phrase is cut in both.
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
    """Average logits [windows, labels] over each text's windows: [texts, labels].

    `counts` has their number by text, 1 or more.
    """
    if len(counts) == len(logits):  # one window per text
        return logits
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(logits, starts, axis=0)
    return np.asarray(sums / np.array(counts, np.float32)[:, None], np.float32)


#: Of one forward pass: enough that matrix products take most of the time, and on CPUs few enough
#: that the activations between two products stay in the cache.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}


class TextClassifier:
    """A fine-tuned model with its tokenizer and its preprocessing."""

    def __init__(self, folder: Folder, *, device: str = "cpu", precision: str = "auto") -> None:
        """Load a `model/` directory; `precision` is as in `resolve_precision`."""
        model, self.labels = huggingface.load_classifier(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.preprocessing = Preprocessing.read(
            huggingface.read_preprocessing(folder), model.encoder.config.max_seq_len
        )
        self.longest = self.preprocessing.seq_len  # tokens that the model reads at once, at most
        self.temperature = huggingface.read_temperature(folder)
        self._device = torch.device(device)
        self._concatenates = self._device.type == "cpu"  # into one row per batch, without padding
        self.precision = resolve_precision(precision, folder, self._device)
        #: The fp32 model, for explanations; `precision` applies to scores.
        self.model = model.to(self._device).eval().requires_grad_(False)
        self._compute = build_model(self.model, self.precision)
        self.tokens_per_batch = TOKENS_PER_BATCH.get(self._device.type, TOKENS_PER_BATCH["cuda"])

    def warm(self) -> None:
        """Score a full batch, so that kernels are selected or compiled for that size."""
        count = max(2, self.tokens_per_batch // self.longest)
        lengths = [self.longest - 1, *[self.longest] * (count - 1)]  # two lengths: GPUs pad
        self.score([np.full(length, self.tokenizer.pad_id) for length in lengths])

    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The logits [texts, labels]; the middle of a text that is too long is left out."""
        return self.score(self.encode(texts))

    def probabilities(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The calibrated probabilities [texts, labels]."""
        return self.calibrated(self.logits(texts))

    def calibrated(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The probabilities of logits [n, labels], divided by the model's temperature."""
        return softmax(logits / np.float32(self.temperature))

    def encode(self, texts: Sequence[str]) -> list[Row]:
        """Tokenize texts, each cut to the model's length. Thread-safe."""
        return self.preprocessing.encode(self.tokenizer, texts)

    def encode_windows(self, texts: Sequence[str]) -> list[list[Row]]:
        """Tokenize texts, each into overlapping windows that cover it. Thread-safe."""
        cleaned = [self.preprocessing.clean(text) for text in texts]
        encoded = self.tokenizer.encode(cleaned).split()
        return [windows(ids, self.longest) for ids in encoded]

    def score(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """The logits [rows, labels] of texts as `encode` returns them, in batches by length."""
        scores = np.empty((len(rows), len(self.labels)), np.float32)
        for batch in self._batches([len(row) for row in rows]):
            scores[batch] = self._forward([rows[i] for i in batch])
        return scores

    def _batches(self, lengths: Sequence[int]) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the indices of rows, shortest first, as many as fit into `tokens_per_batch`."""
        order = np.argsort(lengths, kind="stable")
        begin = total = 0
        for end, index in enumerate(order):
            length = lengths[index]
            total += length
            # Padded, all rows of a batch are as long as the last one.
            cost = total if self._concatenates else length * (end - begin + 1)
            if end > begin and cost > self.tokens_per_batch:
                yield order[begin:end]
                begin, total = end, length
        if len(order):
            yield order[begin:]

    def _forward(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        # An empty text has no state to pool.
        rows = [row if len(row) else np.array([self.tokenizer.pad_id]) for row in rows]
        with torch.inference_mode():
            if self._concatenates:
                filled = [*rows, *self._filler_rows(sum(map(len, rows)))]
                ids = torch.from_numpy(np.concatenate(filled).astype(np.int64))[None]  # [1, T]
                logits = self._compute(ids, None, [len(row) for row in filled])[: len(rows)]
            else:
                padded, mask = pad(rows, self.tokenizer.pad_id)
                there = None if mask is None else torch.from_numpy(mask).to(self._device)
                logits = self._compute(torch.from_numpy(padded).to(self._device), there)
        return np.asarray(logits.float().cpu().numpy())

    def _filler_rows(self, tokens: int) -> list[Row]:
        """Rows of padding tokens that lengthen a batch of `tokens` to `round_up(tokens)`."""
        missing = round_up(tokens) - tokens
        lengths = [min(self.longest, missing - at) for at in range(0, missing, self.longest)]
        return [np.full(length, self.tokenizer.pad_id) for length in lengths]


def round_up(tokens: int) -> int:
    """The next batch length: 16 between a power of two and the next, or every 64 tokens.

    oneDNN generates and keeps code for each batch length, 2 to 3 MB for a model's layers: with any
    length allowed, a replica grew by a gigabyte.
    """
    step = min(64, 1 << max(4, tokens.bit_length() - 5))
    return -(-tokens // step) * step


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The probabilities of logits [n, labels]."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=1, keepdims=True), np.float32)
