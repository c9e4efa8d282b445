"""A fine-tuned classifier for inference: raw texts in, logits or probabilities out.

A model may have an n-gram part beside its encoder: `score` computes the encoder's outputs, `logits`
and `answers` those of both.

On CPUs the texts of a batch are concatenated into one row, and each attends to itself only
(`attend_varlen`): no padding is computed, and apart from the rounding of matrix products a text's
scores do not depend on the other texts of its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raybert.data.preprocess import Preprocessing, pad
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DamagedError
from raybert.inference.precision import build_model, resolve_precision
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.entities import Word, words_of
from raybert.tasks.protocol import F32, AnswerOptions, Outputs
from raybert.tasks.registry import read_task

if TYPE_CHECKING:
    from raybert.tasks.linear.mixture import NgramPart

Row = npt.NDArray[Any]  # token ids of a text or of a window, [tokens]
Text = str | tuple[str, str]  # a text, or a pair for a model that reads pairs


class Encoded(NamedTuple):
    """Texts as a model reads them."""

    rows: list[Row]  # of all texts, in their order
    lengths: list[int]  # tokens of each text
    is_cut: list[bool]  # whether a text had more tokens than the model reads
    ngrams: F32 | None = None  # outputs of the n-gram part, [n, L]


#: A quarter of a window is also in the next one, so that no phrase is cut in both.
OVERLAP = 4


def window_starts(length: int, seq_len: int) -> list[int]:
    """Where the windows of a text of `length` tokens begin, not counting its first special one."""
    if length <= seq_len:
        return [0]
    size = seq_len - 2
    return [*range(0, length - 2 - size, size - size // OVERLAP), length - 2 - size]


def windows(ids: Row, seq_len: int) -> list[Row]:
    """Split a text's ids into windows of at most `seq_len` tokens that cover it.

    Each window begins and ends with the text's first and last id, the special tokens. A text that
    fits is one window; all windows of a longer text have `seq_len` tokens, at least 8.
    """
    if len(ids) <= seq_len:
        return [ids]
    first, inner, last = ids[:1], ids[1:-1], ids[-1:]
    starts = window_starts(len(ids), seq_len)
    return [np.concatenate([first, inner[a : a + seq_len - 2], last]) for a in starts]


def pool(outputs: Outputs, lengths: Sequence[int], seq_len: int) -> Outputs:
    """Outputs of each text, from those of its windows: their mean, or of tokens the most central.

    `lengths` are the tokens of each text, all windows together.
    """
    starts = [window_starts(length, seq_len) for length in lengths]
    if len(outputs) == len(lengths):  # one window per text
        return outputs
    ends = np.cumsum([len(each) for each in starts])
    if isinstance(outputs, np.ndarray):  # [windows, L]
        counts = np.diff(ends, prepend=0)
        sums = np.add.reduceat(outputs, ends - counts, axis=0)
        return np.asarray(sums / counts.astype(np.float32)[:, None], np.float32)
    return [
        _join_tokens(outputs[end - len(each) : end], each, length)
        for end, each, length in zip(ends.tolist(), starts, lengths, strict=True)
    ]


def is_finite(outputs: Outputs) -> bool:
    """Whether all outputs are finite numbers; those of diverged weights are not."""
    each = [outputs] if isinstance(outputs, np.ndarray) else outputs
    return all(np.isfinite(values).all() for values in each)


def _join_tokens(
    outputs: Sequence[npt.NDArray[np.float32]], starts: Sequence[int], length: int
) -> npt.NDArray[np.float32]:
    """The outputs of a text's tokens [T, L], each from the window in whose middle it is."""
    if len(outputs) == 1:
        return outputs[0]
    joined = np.empty((length, outputs[0].shape[1]), np.float32)
    joined[0], joined[-1] = outputs[0][0], outputs[-1][-1]
    size = len(outputs[0]) - 2
    middles = np.array(starts) + (size - 1) / 2
    nearest = np.abs(np.arange(length - 2)[:, None] - middles).argmin(axis=1)
    for window, (values, start) in enumerate(zip(outputs, starts, strict=True)):
        tokens = np.flatnonzero(nearest == window)
        joined[tokens + 1] = values[tokens - start + 1]
    return joined


#: Of one forward pass: enough that matrix products take most of the time, and on CPUs few enough
#: that the activations between two products stay in the cache.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}


class TextClassifier:
    """A fine-tuned model with its tokenizer and its preprocessing."""

    def __init__(self, folder: Folder, *, device: str = "cpu", precision: str = "auto") -> None:
        """Load a `model/` directory; `precision` is as in `resolve_precision`."""
        model, self.labels = huggingface.load_classifier(folder)
        self.task, self.reads_pairs = read_task(folder)
        self.ngrams = read_ngrams(folder)
        if self.ngrams is not None:  # thresholds and the like were fitted for both parts together
            found, linear = self.ngrams.task, self.ngrams.model
            sides = 3 if self.reads_pairs else 1  # the first text, the second, and both
            fits = linear.columns == sides * len(linear.ngrams.index)
            if (found.name, found.labels) != (self.task.name, self.labels) or not fits:
                raise DamagedError(f"{folder}: ngrams.json is of another model; delete it")
            self.task = found
        self.tokenizer = Tokenizer.load(folder)
        self.tokenizer.check(model.encoder.vocab_size)
        self.preprocessing = Preprocessing.read(
            huggingface.read_preprocessing(folder), model.encoder.config.max_seq_len
        )
        #: What the logits were divided by to calibrate them; None: nothing.
        self.calibrated_temperature = huggingface.read_calibration(folder)
        self.longest = self.preprocessing.seq_len  # tokens that the model reads at once, at most
        self._device = torch.device(device)
        self._concatenates = self._device.type == "cpu"  # into one row per batch, without padding
        self.precision = resolve_precision(precision, folder, self._device)
        #: The fp32 model, for explanations; `precision` applies to scores.
        self.model = model.to(self._device).eval().requires_grad_(False)
        self._compute = build_model(self.model, self.precision)
        self.tokens_per_batch = TOKENS_PER_BATCH.get(self._device.type, TOKENS_PER_BATCH["cuda"])

    def warm(self) -> None:
        """Score a full batch, so that kernels are selected or compiled for that size.

        DamagedError: the outputs are not finite in this precision.
        """
        self._finite(self.score(self.full_batch()))

    def full_batch(self) -> list[Row]:
        """Rows of padding that fill a batch, of two lengths: GPUs pad."""
        count = max(2, self.tokens_per_batch // self.longest)
        lengths = [self.longest - 1, *[self.longest] * (count - 1)]
        return [np.full(length, self.tokenizer.pad_id) for length in lengths]

    def logits(self, texts: Sequence[Text]) -> Outputs:
        """The outputs of texts; the middle of a text that is too long is left out.

        DamagedError: they are not finite.
        """
        outputs = self._finite(self.score(self.encode(texts)))
        return self.with_ngrams(outputs, self.ngram_outputs(texts))

    def _finite(self, outputs: Outputs) -> Outputs:
        if is_finite(outputs):
            return outputs
        raise DamagedError(
            f"the model's outputs are not finite (precision {self.precision}): its weights have "
            "diverged; take an earlier version, or train again with a lower lr"
        )

    def probabilities(self, texts: Sequence[Text]) -> Outputs:
        """The outputs as answers show them: calibrated probabilities, or numbers in their unit."""
        return self.task.scores(self.logits(texts))

    def answers(self, texts: Sequence[Text], options: AnswerOptions) -> list[Any]:
        """The task's answers, of elements of its `answer_schema`; long texts in windows."""
        return self.task.answers(self.outputs(texts), self.words(texts), options)

    def outputs(self, texts: Sequence[Text]) -> Outputs:
        """The outputs of whole texts, long ones in windows. DamagedError: they are not finite."""
        rows, lengths = self.encode_windows(texts)
        outputs = self._finite(pool(self.score(rows), lengths, self.longest))
        return self.with_ngrams(outputs, self.ngram_outputs(texts))

    def ngram_outputs(self, texts: Sequence[Text]) -> F32 | None:
        """The outputs of the n-gram part for whole texts; None: it has none. Thread-safe."""
        if self.ngrams is None:
            return None
        return self.ngrams.model.outputs([(t,) if isinstance(t, str) else t for t in texts])

    def with_ngrams(self, outputs: Outputs, linear: F32 | None) -> Outputs:
        """The outputs of both parts, from the encoder's and those of `ngram_outputs`."""
        if self.ngrams is None or linear is None:
            return outputs
        return self.ngrams.add(np.asarray(outputs), linear)

    def encode(self, texts: Sequence[Text]) -> list[Row]:
        """Tokenize texts, each cut to the model's length. Thread-safe."""
        return self.encode_cut(texts).rows

    def encode_cut(self, texts: Sequence[Text]) -> Encoded:
        """As `encode`, with which of them were longer than the model's length. Thread-safe."""
        how = self.preprocessing
        if self.reads_pairs:
            firsts, seconds = ([text[i] for text in texts] for i in (0, 1))
            pairs = how.encode_pairs(self.tokenizer, firsts, seconds)
            rows = [how.join_pair(self.tokenizer, pair) for pair in pairs]
            is_cut = [how.cuts_pair(self.tokenizer, pair) for pair in pairs]
        else:
            rows, is_cut = how.encode(self.tokenizer, [str(text) for text in texts])
        return Encoded(rows, [len(row) for row in rows], is_cut)

    def encode_windows(self, texts: Sequence[Text]) -> tuple[list[Row], list[int]]:
        """Tokenize texts into windows that cover them; pairs are cut. Thread-safe.

        Returns the windows of all texts, and the tokens of each text.
        """
        if self.reads_pairs:
            encoded = self.encode_cut(texts)
            return encoded.rows, encoded.lengths
        cleaned = [self.preprocessing.clean(str(text)) for text in texts]
        whole = self.tokenizer.encode(cleaned).split()
        rows = [row for ids in whole for row in windows(ids, self.longest)]
        return rows, [len(ids) for ids in whole]

    def words(self, texts: Sequence[Text]) -> list[list[Word]] | None:
        """The words of each text, for a task on tokens; None for others."""
        if not self.task.is_per_token:
            return None
        encodings = self.tokenizer.hf.encode_batch([str(text) for text in texts])
        return [words_of(encoding) for encoding in encodings]

    def score(self, rows: Sequence[Row]) -> Outputs:
        """The outputs of texts as `encode` returns them, in batches by length."""
        if self.task.is_per_token:
            tokens: dict[int, npt.NDArray[np.float32]] = {}
            for batch in self._batches([len(row) for row in rows]):
                chosen = [rows[i] for i in batch]
                tokens.update(zip(batch.tolist(), self._forward(chosen), strict=True))
            return [tokens[i] for i in range(len(rows))]
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

    def _forward(self, rows: Sequence[Row]) -> Outputs:
        # An empty text has no state to pool.
        rows = [row if len(row) else np.array([self.tokenizer.pad_id]) for row in rows]
        lengths = [len(row) for row in rows]
        with torch.inference_mode():
            if self._concatenates:
                filled = [*rows, *self._filler_rows(sum(lengths))]
                ids = torch.from_numpy(np.concatenate(filled).astype(np.int64))[None]  # [1, T]
                logits = self._compute(ids, None, [len(row) for row in filled])
                # [rows + filler, L], or of all tokens [1, T, L]
                logits = logits[0] if self.task.is_per_token else logits[: len(rows)]
            else:
                padded, mask = pad(rows, self.tokenizer.pad_id)
                present = None if mask is None else torch.from_numpy(mask).to(self._device)
                logits = self._compute(torch.from_numpy(padded).to(self._device), present)
        values = np.asarray(logits.float().cpu().numpy())
        if not self.task.is_per_token:
            return values
        if self._concatenates:
            return np.split(values, np.cumsum(lengths))[: len(rows)]
        return [row[:length] for row, length in zip(values, lengths, strict=True)]

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


def read_ngrams(folder: Folder) -> NgramPart | None:
    """The n-gram part of a model; None where it has none. Raises as `load_part`."""
    if not folder.exists("ngrams.json"):
        return None
    from raybert.tasks.linear.store import load_part  # imports scikit-learn

    return load_part(folder)
