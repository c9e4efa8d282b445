"""Tokenized texts with their labels, in memory and in Parquet, and micro-batches of them.

Shapes: B texts, T tokens, L labels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.config import Settings
from raybert.data.loader import digest, parts_of
from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DamagedError
from raybert.storage.folder import Folder
from raybert.tasks.protocol import NO_LABEL, Targets


class TextFile(Settings):
    """A Parquet file of tokenized texts, as the file beside it describes it."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenized texts with their labels, in memory; pickled, a few long arrays."""

    input_ids: list[npt.NDArray[Any]]  # one array of token ids for each text
    labels: Targets  # NO_LABEL or NaN where there is none
    teacher: npt.NDArray[np.float32] | None = None  # [rows, L]: the teacher's logits
    #: Of pairs, ids of the second text; `input_ids` are then the first one's, both without special
    #: tokens, until `shortened` joins them.
    seconds: list[npt.NDArray[Any]] | None = None
    cut: int = 0  # texts that were longer, where they were tokenized just now; not stored

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text, int64 [rows]."""
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def shortened(self, how: Preprocessing, tokenizer: Tokenizer) -> TokenizedTexts:
        """The same texts as the model reads them; targets of removed tokens are removed."""
        if self.seconds is not None:
            pairs = zip(self.input_ids, self.seconds, strict=True)
            joined = [how.join_pair(tokenizer, pair) for pair in pairs]
            return replace(self, input_ids=joined, seconds=None)
        labels = self.labels
        if isinstance(labels, list):
            labels = [how.shorten(row) for row in labels]
        return replace(self, input_ids=[how.shorten(ids) for ids in self.input_ids], labels=labels)

    def targets(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The targets of a batch's texts; those of tokens are padded to the longest text."""
        if not isinstance(self.labels, list):
            return self.labels[rows]
        chosen = [self.labels[row] for row in rows]
        padded = np.full((len(chosen), max(map(len, chosen))), NO_LABEL, np.int64)
        for row, values in enumerate(chosen):
            padded[row, : len(values)] = values
        return padded

    def __reduce__(self) -> tuple[Any, ...]:
        columns = (
            flatten(column) if isinstance(column, list) else column
            for column in (self.input_ids, self.labels, self.seconds)
        )
        return TokenizedTexts._from_flat, (*columns, self.teacher)

    @classmethod
    def _from_flat(cls, input_ids: Any, labels: Any, seconds: Any, teacher: Any) -> TokenizedTexts:
        ids, labels, seconds = (
            [column[0][a:b] for a, b in itertools.pairwise(column[1])]
            if isinstance(column, tuple)
            else column
            for column in (input_ids, labels, seconds)
        )
        return cls(ids, labels, teacher, seconds)

    def save(self, folder: Folder, name: str) -> TextFile:
        """Write Parquet: input_ids and seconds list<uint32>, teacher list<float>, and label.

        Labels are int64, list<float> of each text, or list<int64> of each text's tokens.
        """
        columns = {"input_ids": _ragged_column(self.input_ids, np.uint32)}
        if isinstance(self.labels, list):
            columns["label"] = _ragged_column(self.labels, np.int64)
        elif self.labels.ndim == 2:
            columns["label"] = _matrix_column(self.labels)
        else:
            columns["label"] = pa.array(self.labels)
        if self.teacher is not None:
            columns["teacher"] = _matrix_column(self.teacher)
        if self.seconds is not None:
            columns["seconds"] = _ragged_column(self.seconds, np.uint32)
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
        values = {name: _read_column(table[name].chunk(0)) for name in table.column_names}
        return cls._from_flat(
            values["input_ids"], values["label"], values.get("seconds"), values.get("teacher")
        )


_Flat = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]  # values of all rows, offsets [rows + 1]


def flatten(rows: list[npt.NDArray[Any]], dtype: npt.DTypeLike | None = None) -> _Flat:
    """Concatenate arrays; their values, and the offsets [rows + 1]."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    flat = np.concatenate(rows) if rows else np.empty(0)
    if dtype is None:
        dtype = np.int64 if np.issubdtype(flat.dtype, np.signedinteger) else np.uint32
    return flat.astype(dtype), offsets


def _ragged_column(rows: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> pa.Array:
    flat, offsets = flatten(rows, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat))


def _matrix_column(values: npt.NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _read_column(column: pa.Array) -> Any:
    """A column of `TokenizedTexts.save` as an array, or as a `_Flat`."""
    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy().reshape(len(column), -1)
    if pa.types.is_list(column.type):
        return column.flatten().to_numpy(), column.offsets.to_numpy()
    return column.to_numpy()


_USUAL_LENGTH = 512


def rows_of_length(rows: int, length: int) -> int:
    """How many texts of a length take no more memory than `rows` of 512 tokens."""
    return max(1, min(rows, rows * _USUAL_LENGTH // max(1, length)))


@dataclass(frozen=True)
class TextBatch:
    """A micro-batch of texts, padded to the longest one."""

    step: int
    micro_batch_index: int
    row_ids: npt.NDArray[np.int64]  # [B]
    input_ids: npt.NDArray[np.int64]  # [B, T]
    attention_mask: npt.NDArray[np.bool_] | None  # [B, T], False at padding; None: no padding
    labels: npt.NDArray[Any]  # int64 [B] or [B, T], float32 [B, L]; NO_LABEL or NaN: none
    teacher: npt.NDArray[np.float32] | None = None  # [B, L]: the teacher's logits

    @property
    def count(self) -> int:
        """Texts, or tokens, with a target: a label, or a teacher's logits."""
        if self.teacher is not None:
            return len(self.labels)
        if np.issubdtype(self.labels.dtype, np.floating):
            return int((~np.isnan(self.labels)).any(axis=1).sum())
        return int((self.labels != NO_LABEL).sum())

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        mask = self.attention_mask
        return int(self.input_ids.size if mask is None else mask.sum())

    def digest(self) -> str:
        """A hash over step, micro-batch index, row ids, inputs and labels."""
        return digest(self.step, self.micro_batch_index, self.row_ids, self.input_ids, self.labels)

    def split(self, rows: int) -> Sequence[TextBatch]:
        """The same texts in batches of at most `rows`, fewer where texts are very long."""
        rows = rows_of_length(rows, self.input_ids.shape[1])
        if len(self.row_ids) <= rows:
            return [self]
        mask, teacher = self.attention_mask, self.teacher
        return [
            replace(
                self,
                row_ids=self.row_ids[part],
                input_ids=self.input_ids[part],
                attention_mask=None if mask is None else mask[part],
                labels=self.labels[part],
                teacher=None if teacher is None else teacher[part],
            )
            for part in parts_of(len(self.row_ids), rows)
        ]
