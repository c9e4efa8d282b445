"""Labelled texts for fine-tuning: read, split and tokenized once, for all workers and restarts."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from raybert.config import Settings
from raybert.data.loader import digest
from raybert.data.preprocess import Preprocessing
from raybert.data.sources import documents
from raybert.data.sources.labelled import Labelled, labelled, split_rows
from raybert.data.sources.source_config import SourceConfig
from raybert.data.tokenize_on_ray import tokenize
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DamagedError, DataError
from raybert.storage.folder import Folder

DATA = "data.json"
NO_LABEL = -1

#: Gives a teacher's logits for texts: [rows, labels], in the order of these label names.
Teach = Callable[[pa.ChunkedArray, list[str]], npt.NDArray[np.float32]]


class DistillConfig(Settings):
    """What a teacher adds to the labels (arXiv 1503.02531)."""

    teacher: str | list[str] | None = Field(
        None,
        description="a model that teaches, an ensemble, or several models whose probabilities are "
        "averaged; null: labels alone",
    )
    share: float = Field(
        0.5, gt=0, le=1, description="of a labelled text's loss that is the teacher's"
    )
    temperature: float = Field(2.0, gt=0, description="by which both models' logits are divided")
    unlabelled: SourceConfig | None = Field(
        None, description="texts besides, which the teacher alone has an answer to"
    )

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if self.unlabelled is not None and self.teacher is None:
            raise ValueError(
                "unlabelled texts need an answer to learn; name a model with finetune.distill."
                "teacher"
            )
        return self

    @property
    def teachers(self) -> list[str]:
        """The configured models as a list."""
        given = self.teacher or []
        return [given] if isinstance(given, str) else given


class TextsConfig(Settings):
    """Which texts a classifier is trained and chosen on, and how much of each it reads."""

    source: SourceConfig = Field(SourceConfig(), description="labelled texts to train on")
    validation: SourceConfig | None = Field(
        None, description="labelled texts to choose by; null: a share of the source is set apart"
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the source that is set apart to choose by"
    )
    seq_len: int | None = Field(None, ge=8, description="tokens of a text; null: the corpus's rows")
    head_share: float = Field(
        0.25, gt=0, le=1, description="of a longer text's tokens: share taken from its beginning"
    )
    distill: DistillConfig = DistillConfig()


class DataFile(Settings):
    """A file of tokenized texts, beside the run."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Texts:
    """Tokenized, labelled texts, in memory.

    Between processes they travel as a few long arrays, which Ray's object store maps into all of
    them at once.
    """

    input_ids: list[npt.NDArray[Any]]  # one array a text
    labels: npt.NDArray[np.int64]  # [rows]; NO_LABEL where there is none
    teacher: npt.NDArray[np.float32] | None = None  # [rows, labels]: logits, where there is one

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text."""
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def shortened(self, seq_len: int, head_tokens: int) -> Texts:
        """The texts as `Preprocessing` of these lengths would have made them."""
        how = Preprocessing(seq_len, head_tokens)
        return replace(self, input_ids=[how.shorten(ids) for ids in self.input_ids])

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts._of_flat, (*self._flat(), self.labels, self.teacher)

    def _flat(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """All ids in a row, and where each text begins and ends."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        flat = np.concatenate(self.input_ids) if self.input_ids else np.empty(0)
        return flat.astype(np.uint32), bounds

    @classmethod
    def _of_flat(cls, flat: Any, bounds: Any, labels: Any, teacher: Any) -> Texts:
        return cls([flat[a:b] for a, b in itertools.pairwise(bounds)], labels, teacher)

    def save(self, folder: Folder, name: str) -> DataFile:
        """Write them as Parquet: input_ids list<uint32>, label int64, teacher list<float>."""
        flat, bounds = self._flat()
        columns = {
            "input_ids": pa.ListArray.from_arrays(
                pa.array(bounds.astype(np.int32)), pa.array(flat)
            ),
            "label": pa.array(self.labels),
        }
        if self.teacher is not None:
            scores = pa.array(self.teacher.ravel())
            columns["teacher"] = pa.FixedSizeListArray.from_arrays(scores, self.teacher.shape[1])
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        data = sink.getvalue()
        folder.write_bytes(name, data)
        digest = hashlib.sha256(data).hexdigest()
        return DataFile(name=name, rows=len(self.labels), sha256=digest)

    @classmethod
    def load(cls, folder: Folder, file: DataFile) -> Texts:
        """Read what `save` wrote.

        Raises:
            DamagedError: the file is missing, cut short or altered.
        """
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
            scores = table["teacher"].combine_chunks().flatten().to_numpy()
            teacher = scores.reshape(len(table), -1)
        flat, bounds = column.flatten().to_numpy(), column.offsets.to_numpy()
        return cls._of_flat(flat, bounds, table["label"].to_numpy(), teacher)


@dataclass(frozen=True)
class TextBatch:
    """The texts of one micro-batch of a step."""

    step: int
    micro_batch_index: int
    row_ids: npt.NDArray[np.int64]  # [n]
    input_ids: npt.NDArray[np.int64]  # [n, T]
    attention_mask: npt.NDArray[np.bool_] | None  # [n, T]
    labels: npt.NDArray[np.int64]  # [n]; NO_LABEL where a text has none
    teacher: npt.NDArray[np.float32] | None = None  # [n, labels]: the teacher's logits

    @property
    def count(self) -> int:
        """Texts with an answer to learn."""
        return int((self.labels != NO_LABEL).sum()) if self.teacher is None else len(self.labels)

    @property
    def tokens(self) -> int:
        """Tokens read, padding aside."""
        mask = self.attention_mask
        return int(self.input_ids.size if mask is None else mask.sum())

    def digest(self) -> str:
        """A hash of step, micro-batch index, row ids, inputs and labels."""
        return digest(self.step, self.micro_batch_index, self.row_ids, self.input_ids, self.labels)


class Prepared(Settings):
    """What `prepare_data` made: written beside the files, and last."""

    made_from: dict[str, Any]
    train: DataFile
    validation: DataFile
    labels: list[str]
    seq_len: int
    head_tokens: int
    skipped: dict[str, int]


def prepare_data(
    config: TextsConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int,
    folder: Folder,
    *,
    teach: Teach | None = None,
    teacher: str = "",
) -> Prepared:
    """Read, split and tokenize the labelled texts, once for all workers and restarts.

    Tokenization runs in Ray Data where Ray is connected.

    Args:
        config: which texts.
        tokenizer: the model's.
        seq_len: tokens of a text at most.
        seed: decides which texts are set apart, where no others are given to choose by.
        folder: where to.
        teach: gives the answers of the teacher; None where there is none.
        teacher: its identity.

    Raises:
        DataError: whatever is wrong with the texts or labels.
    """
    made_from = {**_made_from(config, tokenizer, seq_len), "seed": seed}
    if teach is not None:
        made_from["teacher"] = teacher
    made = prepared_data(folder)
    if made is not None and made.made_from == made_from:
        return made
    folder.delete(DATA)
    texts = labelled(config.source)
    skipped = Counter(texts.skipped)
    if config.validation is not None:
        alike = config.validation.model_copy(update={"html_breaks": config.source.html_breaks})
        train, validation = texts, labelled(alike, names=texts.names)
        skipped.update(validation.skipped)
    else:
        held = round(len(texts.labels) * config.validation_fraction)
        parts = split_rows((str(text) for text in texts.texts), held, seed=seed)
        if not len(parts.held) or not len(parts.rest):
            raise DataError(
                f"finetune.validation_fraction={config.validation_fraction} sets "
                f"{len(parts.held):,} of {len(texts.labels):,} labelled texts apart to choose by "
                f"and leaves {len(parts.rest):,} to train on; change it, or give more texts"
            )
        train, validation = texts.take(parts.rest), texts.take(parts.held)
    if config.distill.unlabelled is not None:
        train = _with_unlabelled(config, train, validation, skipped)
    head_tokens = max(1, round(seq_len * config.head_share))
    how = Preprocessing(seq_len, head_tokens, config.source.html_breaks)
    tokenized = {
        name: Texts(tokenize(part.texts, tokenizer, how), part.labels)
        for name, part in (("train", train), ("validation", validation))
    }
    if teach is not None:
        tokenized["train"] = replace(tokenized["train"], teacher=teach(train.texts, texts.names))
    prepared = Prepared(
        made_from=made_from,
        **{name: part.save(folder, f"{name}.parquet") for name, part in tokenized.items()},
        labels=texts.names,
        seq_len=how.seq_len,
        head_tokens=how.head_tokens,
        skipped=dict(skipped),
    )
    folder.write_json(DATA, prepared.model_dump())
    return prepared


def prepared_data(folder: Folder) -> Prepared | None:
    """What `prepare_data` has made in a folder; None where it has not."""
    return Prepared.model_validate(folder.read_json(DATA)) if folder.exists(DATA) else None


def _made_from(config: TextsConfig, tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """All that decides what `prepare_data` makes."""
    used = {"source", "validation", "validation_fraction", "head_share"}
    given = [config.source, *([config.validation] if config.validation else [])]
    made_from = {
        **config.model_dump(mode="json", include=used),
        "files": [documents.fingerprint(source, labels=True) for source in given],
        "tokenizer": tokenizer.hash,
        "seq_len": seq_len,
    }
    unlabelled = config.distill.unlabelled
    if unlabelled is not None:
        files = documents.fingerprint(unlabelled)
        made_from["unlabelled"] = {**unlabelled.model_dump(mode="json"), "files": files}
    return made_from


def _with_unlabelled(
    config: TextsConfig, train: Labelled, validation: Labelled, skipped: Counter[str]
) -> Labelled:
    """Add the texts without labels, but for those that are labelled: some of these are held out."""
    source = config.distill.unlabelled
    assert source is not None
    alike = source.model_copy(update={"html_breaks": config.source.html_breaks})
    known = {*train.texts.to_pylist(), *validation.texts.to_pylist()}
    found = [
        text
        for table in documents.documents(alike, skipped=skipped)
        for text in table["text"].to_pylist()
    ]
    texts = [text for text in found if text not in known]
    if len(texts) < len(found):
        skipped["labelled elsewhere"] += len(found) - len(texts)
    return train._replace(
        texts=pa.chunked_array([*train.texts.chunks, pa.array(texts, pa.string())]),
        labels=np.concatenate([train.labels, np.full(len(texts), NO_LABEL, np.int64)]),
    )
