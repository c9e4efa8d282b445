"""Labelled texts, read, split and tokenized once for all workers and restarts of a run.

`prepare_texts` writes two Parquet files and, last, `data.json` with everything that decides their
content. A later call with the same content reads `data.json` and returns at once. Each worker loads
the files as `TokenizedTexts` and makes micro-batches of them.

Shapes: B texts, T tokens, L labels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.config import Settings
from raybert.data.loader import digest
from raybert.data.preprocess import Preprocessing, tokenize
from raybert.data.sources import documents
from raybert.data.sources.documents import Labelled, labelled, split_rows
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DamagedError, DataError
from raybert.storage.folder import Folder
from raybert.tasks.settings import TextsConfig

DATA_FILE = "data.json"
NO_LABEL = -1

#: Computes a teacher's logits for texts, fp32 [rows, L]; the second argument names the L labels.
Teach = Callable[[pa.ChunkedArray, list[str]], npt.NDArray[np.float32]]


class TextFile(Settings):
    """A Parquet file of tokenized texts, as the file beside it describes it."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenized texts with their labels, in memory; pickled, a few long arrays."""

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


class PreparedTexts(Settings):
    """The content of `data.json`."""

    made_from: dict[str, Any]
    train: TextFile
    validation: TextFile
    labels: list[str]
    seq_len: int
    head_tokens: int
    skipped: dict[str, int]


def prepare_texts(
    config: TextsConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int,
    folder: Folder,
    *,
    teach: Teach | None = None,
    teacher: str = "",
) -> PreparedTexts:
    """Read, split and tokenize labelled texts, or return what an earlier call has prepared.

    Tokenization runs in Ray Data where Ray is connected. The seed decides which texts are set apart
    for validation, where none are given for it. `teach` computes the teacher's logits, and
    `teacher` is its hash. A DataError names a file, row or label that can't be used.
    """
    made_from = {**_made_from(config, tokenizer, seq_len), "seed": seed}
    if teach is not None:
        made_from["teacher"] = teacher
    prepared = read_prepared_texts(folder)
    if prepared is not None and prepared.made_from == made_from:
        return prepared
    folder.delete(DATA_FILE)
    skipped: Counter[str] = Counter()
    train, validation = _read_and_split(config, seed, skipped)
    if config.distill.unlabelled is not None:
        train = _add_unlabelled(config, train, validation, skipped)
    head_tokens = max(1, round(seq_len * config.head_share))
    preprocessing = Preprocessing(seq_len, head_tokens, config.source.html_breaks)
    tokenized = {
        name: TokenizedTexts(tokenize(part.texts, tokenizer, preprocessing), part.labels)
        for name, part in (("train", train), ("validation", validation))
    }
    if teach is not None:
        logits = teach(train.texts, train.names)
        tokenized["train"] = replace(tokenized["train"], teacher=logits)
    prepared = PreparedTexts(
        made_from=made_from,
        **{name: part.save(folder, f"{name}.parquet") for name, part in tokenized.items()},
        labels=train.names,
        seq_len=preprocessing.seq_len,
        head_tokens=preprocessing.head_tokens,
        skipped=dict(skipped),
    )
    folder.write_json(DATA_FILE, prepared.model_dump())
    return prepared


def read_prepared_texts(folder: Folder) -> PreparedTexts | None:
    """Read what `prepare_texts` has written to a folder; None: nothing, or not all of it."""
    if not folder.exists(DATA_FILE):
        return None
    return PreparedTexts.model_validate(folder.read_json(DATA_FILE))


def _made_from(config: TextsConfig, tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """Everything that decides the result of `prepare_texts`, but the seed and the teacher."""
    used = {"source", "validation", "validation_fraction", "head_share"}
    sources = [config.source, *([config.validation] if config.validation else [])]
    made_from = {
        **config.model_dump(mode="json", include=used),
        "files": [documents.fingerprint(source, labels=True) for source in sources],
        "tokenizer": tokenizer.hash,
        "seq_len": seq_len,
    }
    unlabelled = config.distill.unlabelled
    if unlabelled is not None:
        files = documents.fingerprint(unlabelled)
        made_from["unlabelled"] = {**unlabelled.model_dump(mode="json"), "files": files}
    return made_from


def _read_and_split(
    config: TextsConfig, seed: int, skipped: Counter[str]
) -> tuple[Labelled, Labelled]:
    """Read the texts to train on and those to validate on; count the skipped rows by reason."""
    texts = labelled(config.source)
    skipped.update(texts.skipped)
    if config.validation is not None:
        source = config.validation.model_copy(update={"html_breaks": config.source.html_breaks})
        validation = labelled(source, names=texts.names)
        skipped.update(validation.skipped)
        return texts, validation
    count = round(len(texts.labels) * config.validation_fraction)
    parts = split_rows((str(text) for text in texts.texts), count, seed=seed)
    if not len(parts.heldout) or not len(parts.rest):
        raise DataError(
            f"finetune.validation_fraction={config.validation_fraction} sets "
            f"{len(parts.heldout):,} of {len(texts.labels):,} labelled texts apart for validation "
            f"and leaves {len(parts.rest):,} for training; change it, or give more texts"
        )
    return texts.take(parts.rest), texts.take(parts.heldout)


def _add_unlabelled(
    config: TextsConfig, train: Labelled, validation: Labelled, skipped: Counter[str]
) -> Labelled:
    """Add the unlabelled texts; those that are labelled, too, may be held out and are skipped."""
    source = config.distill.unlabelled
    assert source is not None
    source = source.model_copy(update={"html_breaks": config.source.html_breaks})
    known = {*train.texts.to_pylist(), *validation.texts.to_pylist()}
    found = [
        text
        for table in documents.documents(source, skipped=skipped)
        for text in table["text"].to_pylist()
    ]
    texts = [text for text in found if text not in known]
    if len(texts) < len(found):
        skipped["labelled elsewhere"] += len(found) - len(texts)
    return train._replace(
        texts=pa.chunked_array([*train.texts.chunks, pa.array(texts, pa.string())]),
        labels=np.concatenate([train.labels, np.full(len(texts), NO_LABEL, np.int64)]),
    )
