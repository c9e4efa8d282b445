"""Tokenized, labelled texts: a data set in memory and in a file, and its micro-batches.

Shapes: B texts, T tokens, L labels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.config import Settings
from raybert.data.loader import digest
from raybert.data.preprocess import Preprocessing
from raybert.errors import DamagedError
from raybert.storage.folder import Folder

NO_LABEL = -1


class TextFile(Settings):
    """A Parquet file of tokenized texts, as the file beside it describes it."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenized texts with their labels, in memory.

    Pickled, they are a few long arrays, which Ray's object store maps into many processes at once.
    """

    input_ids: list[npt.NDArray[Any]]  # one array of token ids for each text
    labels: npt.NDArray[np.int64]  # [rows]; NO_LABEL where there is none
    teacher: npt.NDArray[np.float32] | None = None  # [rows, L]: the teacher's logits

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text, int64 [rows]."""
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def shortened(self, seq_len: int, head_tokens: int) -> TokenizedTexts:
        """The same texts as `Preprocessing` with these lengths gives them."""
        preprocessing = Preprocessing(seq_len, head_tokens)
        return replace(self, input_ids=[preprocessing.shorten(ids) for ids in self.input_ids])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizedTexts._from_flat, (*self._flatten(), self.labels, self.teacher)

    def _flatten(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Concatenate the ids; return them with the offsets of the texts, [rows + 1]."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        flat = np.concatenate(self.input_ids) if self.input_ids else np.empty(0)
        return flat.astype(np.uint32), offsets

    @classmethod
    def _from_flat(cls, flat: Any, offsets: Any, labels: Any, teacher: Any) -> TokenizedTexts:
        return cls([flat[a:b] for a, b in itertools.pairwise(offsets)], labels, teacher)

    def save(self, folder: Folder, name: str) -> TextFile:
        """Write Parquet: input_ids list<uint32>, label int64, teacher list<float>."""
        flat, offsets = self._flatten()
        columns = {
            "input_ids": pa.ListArray.from_arrays(
                pa.array(offsets.astype(np.int32)), pa.array(flat)
            ),
            "label": pa.array(self.labels),
        }
        if self.teacher is not None:
            logits = pa.array(self.teacher.ravel())
            columns["teacher"] = pa.FixedSizeListArray.from_arrays(logits, self.teacher.shape[1])
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        data = sink.getvalue()
        folder.write_bytes(name, data)
        sha256 = hashlib.sha256(data).hexdigest()
        return TextFile(name=name, rows=len(self.labels), sha256=sha256)

    @classmethod
    def load(cls, folder: Folder, file: TextFile) -> TokenizedTexts:
        """Read a file that `save` wrote; a DamagedError if it is missing, cut short or altered."""
        try:
            data = folder.read_bytes(file.name)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise DamagedError(
                f"{folder.join(file.name)} is damaged; delete {folder} and run the command again"
            )
        table = pq.read_table(io.BytesIO(data)).combine_chunks()
        column = table["input_ids"].chunk(0)
        teacher = None
        if "teacher" in table.column_names:
            logits = table["teacher"].combine_chunks().flatten().to_numpy()
            teacher = logits.reshape(len(table), -1)
        flat, offsets = column.flatten().to_numpy(), column.offsets.to_numpy()
        return cls._from_flat(flat, offsets, table["label"].to_numpy(), teacher)


@dataclass(frozen=True)
class TextBatch:
    """A micro-batch of texts, padded to the longest one."""

    step: int
    micro_batch_index: int
    row_ids: npt.NDArray[np.int64]  # [B]
    input_ids: npt.NDArray[np.int64]  # [B, T]
    attention_mask: npt.NDArray[np.bool_] | None  # [B, T], False at padding; None: no padding
    labels: npt.NDArray[np.int64]  # [B]; NO_LABEL where there is none
    teacher: npt.NDArray[np.float32] | None = None  # [B, L]: the teacher's logits

    @property
    def count(self) -> int:
        """Texts with a target: a label, or a teacher's logits."""
        return int((self.labels != NO_LABEL).sum()) if self.teacher is None else len(self.labels)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        mask = self.attention_mask
        return int(self.input_ids.size if mask is None else mask.sum())

    def digest(self) -> str:
        """A hash over step, micro-batch index, row ids, inputs and labels."""
        return digest(self.step, self.micro_batch_index, self.row_ids, self.input_ids, self.labels)
