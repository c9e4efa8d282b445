"""The classifier as an object: raw texts in, probabilities out. Batch and HTTP answers use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raybert.model import hub
from raybert.storage import Folder
from raybert.text.preprocess import Preprocessing, pad
from raybert.text.tokenizer import Tokenizer
from raybert.train.group import has_fast_bf16

TOKENS_PER_BATCH = 8192  # of padded input: large enough that products, not calls, take the time


class TextClassifier:
    """A fine-tuned model with its tokenizer and its preprocessing."""

    def __init__(self, folder: Folder, *, device: str = "cpu", precision: str = "auto") -> None:
        """Load a `model/` directory.

        Raises:
            UserError: there is no classifier there.
            DamagedError: a file is cut short or altered.
        """
        self.model, self.labels = hub.load_classifier(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.preprocessing = Preprocessing.read(
            hub.read_preprocessing(folder), self.model.encoder.config.max_seq_len
        )
        self._device = torch.device(device)
        self._bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(self._device))
        self.model.to(self._device).eval()

    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Score texts: [n, labels]. Texts are computed by length, so that little is padding."""
        return self.logits_of_ids(self.preprocessing.encode(self.tokenizer, texts))

    def logits_of_ids(self, rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Score texts that are tokenized already: [n, labels]."""
        order = np.argsort([len(row) for row in rows], kind="stable")
        scores = np.empty((len(rows), len(self.labels)), np.float32)
        begin = 0
        while begin < len(order):
            end = _batch_end(rows, order, begin)
            at = order[begin:end]
            ids, mask = pad([rows[i] for i in at], self.tokenizer.pad_id)
            scores[at] = self._forward(ids, mask)
            begin = end
        return scores

    def probabilities(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The labels' probabilities for each text: [n, labels]."""
        return softmax(self.logits(texts))

    def _forward(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[Any]:
        there = None if mask is None else torch.from_numpy(mask).to(self._device)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16),
        ):
            logits = self.model(torch.from_numpy(ids).to(self._device), there)
        return np.asarray(logits.float().cpu().numpy())


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities of logits [n, labels]."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=1, keepdims=True), np.float32)


def _batch_end(rows: Sequence[npt.NDArray[Any]], order: npt.NDArray[np.int64], begin: int) -> int:
    """The end of the batch that starts at `begin`: as many texts as fit into the token budget."""
    end = begin
    while end < len(order):
        width = len(rows[order[end]])  # lengths rise: the last row is the widest
        if end > begin and width * (end - begin + 1) > TOKENS_PER_BATCH:
            break
        end += 1
    return end
