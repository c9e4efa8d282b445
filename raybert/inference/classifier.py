"""The classifier as an object: raw texts in, probabilities out. Batch and HTTP answers use it.

On CPUs the texts of a batch stand end to end in one row, each seeing itself alone
(`attend_varlen`): nothing is computed for padding, and but for the rounding of matrix products a
text's scores do not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from raybert.data.preprocess import Preprocessing, pad, split
from raybert.data.tokenizer import Tokenizer
from raybert.inference import engines
from raybert.inference import precision as precisions
from raybert.inference.windows import Row, windows
from raybert.model import huggingface
from raybert.storage.folder import Folder

#: Of one forward pass: large enough that products, not calls, take the time, and small enough that
#: on CPUs what lies between two products stays in the cache.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}


class TextClassifier:
    """A fine-tuned model with its tokenizer and its preprocessing."""

    def __init__(self, folder: Folder, *, device: str = "cpu", precision: str = "auto") -> None:
        """Load a `model/` directory.

        Args:
            folder: the directory.
            device: cpu or cuda.
            precision: one of `precision.PRECISIONS`; auto: what was chosen for this model and
                machine, or bf16 where the device multiplies it in hardware.

        Raises:
            UserError: there is no classifier there.
            DamagedError: a file is cut short or altered.
        """
        model, self.labels = huggingface.load_classifier(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.preprocessing = Preprocessing.read(
            huggingface.read_preprocessing(folder), model.encoder.config.max_seq_len
        )
        self.temperature = huggingface.read_temperature(folder)
        self._device = torch.device(device)
        self.precision = precisions.resolve(precision, folder, self._device)
        #: In fp32, for explanations; scores come from what `precision` makes of it.
        self.model = model.to(self._device).eval().requires_grad_(False)
        self._engine = engines.engine(self.model, self.precision)
        self.tokens_per_batch = TOKENS_PER_BATCH.get(self._device.type, TOKENS_PER_BATCH["cuda"])

    @property
    def longest(self) -> int:
        """Tokens of a text that the model reads at once, special ones included."""
        return self.preprocessing.seq_len

    def warm(self) -> None:
        """Score a full batch: kernels are chosen, or compiled, for the size that comes first."""
        count = max(2, self.tokens_per_batch // self.longest)
        lengths = [self.longest - 1, *[self.longest] * (count - 1)]  # of two, to be padded on GPUs
        self.score([np.full(length, self.tokenizer.pad_id) for length in lengths])

    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Score texts: [n, labels]. One that is too long for the model loses its middle."""
        return self.score(self.encode(texts))

    def probabilities(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The labels' calibrated probabilities for each text: [n, labels]."""
        return self.calibrated(self.logits(texts))

    def calibrated(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Probabilities of logits [n, labels], as sure as the model has a right to be."""
        return softmax(logits / np.float32(self.temperature))

    def encode(self, texts: Sequence[str]) -> list[Row]:
        """Turn texts into ids, [up to the model's length] each. Safe for threads."""
        return self.preprocessing.encode(self.tokenizer, texts)

    def encode_windows(self, texts: Sequence[str]) -> list[list[Row]]:
        """Turn texts into ids, each text as windows that together cover it. Safe for threads."""
        cleaned = [self.preprocessing.clean(text) for text in texts]
        whole = split(self.tokenizer.encode(cleaned))
        return [windows(ids, self.longest) for ids in whole]

    def score(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """Score texts as `encode` gives them: [n, labels], computed by length in batches."""
        lengths = [len(row) for row in rows]
        order = np.argsort(lengths, kind="stable")
        scores = np.empty((len(rows), len(self.labels)), np.float32)
        begin = 0
        while begin < len(order):
            end = self._batch_end(lengths, order, begin)
            at = order[begin:end]
            scores[at] = self._forward([rows[i] for i in at])
            begin = end
        return scores

    def _batch_end(self, lengths: Sequence[int], order: npt.NDArray[np.int64], begin: int) -> int:
        """The end of the batch that starts at `begin`: as many texts as fit the token budget."""
        end, total = begin, 0
        while end < len(order):
            length = lengths[order[end]]
            total += length
            # Lengths rise. Padded, all texts are as wide as the last one.
            cost = total if self._is_packed else length * (end - begin + 1)
            if end > begin and cost > self.tokens_per_batch:
                break
            end += 1
        return end

    @property
    def _is_packed(self) -> bool:
        return self._device.type == "cpu"

    def _forward(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        # A text of which nothing is left would have no state to pool.
        rows = [row if len(row) else np.array([self.tokenizer.pad_id]) for row in rows]
        with torch.inference_mode():
            if self._is_packed:
                filled = [*rows, *self._filling(sum(map(len, rows)))]
                ids = torch.from_numpy(np.concatenate(filled).astype(np.int64))[None]  # [1, T]
                logits = self._engine(ids, None, [len(row) for row in filled])[: len(rows)]
            else:
                padded, mask = pad(rows, self.tokenizer.pad_id)
                there = None if mask is None else torch.from_numpy(mask).to(self._device)
                logits = self._engine(torch.from_numpy(padded).to(self._device), there)
        return np.asarray(logits.float().cpu().numpy())

    def _filling(self, tokens: int) -> list[Row]:
        """Texts of no meaning that make a row of `tokens` as long as `round_up` says."""
        missing = round_up(tokens) - tokens
        lengths = [min(self.longest, missing - at) for at in range(0, missing, self.longest)]
        return [np.full(length, self.tokenizer.pad_id) for length in lengths]


def round_up(tokens: int) -> int:
    """The next length that rows are given: 16 between a power of two and the next, or every 64.

    For each length of a row that it meets, oneDNN makes and keeps code, 2 to 3 MB in a model's
    layers: a replica grew by a gigabyte until it had met them all.
    """
    step = min(64, 1 << max(4, tokens.bit_length() - 5))
    return -(-tokens // step) * step


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Probabilities of logits [n, labels]."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=1, keepdims=True), np.float32)
