"""Labelled texts for fine-tuning: read, split and tokenized once, for all workers and restarts."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from raybert.config import Settings
from raybert.errors import DamagedError, DataError
from raybert.storage import Folder
from raybert.text import sources
from raybert.text.preprocess import Preprocessing
from raybert.text.sources import Labelled, SourceConfig, cut, labelled
from raybert.text.tokenize_on_ray import tokenize
from raybert.text.tokenizer import Tokenizer

DATA = "data.json"


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


class DataFile(Settings):
    """A file of tokenized texts, beside the run."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Texts:
    """Tokenized, labelled texts, in memory."""

    input_ids: list[npt.NDArray[Any]]  # one array a text
    labels: npt.NDArray[np.int64]  # [rows]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text."""
        return np.array([len(ids) for ids in self.input_ids], np.int64)

    def save(self, folder: Folder, name: str) -> DataFile:
        """Write them as Parquet: input_ids list<uint32>, label int64."""
        flat = pa.array(np.concatenate(self.input_ids).astype(np.uint32))
        offsets = pa.array(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32))
        ids = pa.ListArray.from_arrays(offsets, flat)
        sink = io.BytesIO()
        pq.write_table(pa.table({"input_ids": ids, "label": self.labels}), sink)
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
        flat, bounds = column.flatten().to_numpy(), column.offsets.to_numpy()
        ids = [flat[a:b] for a, b in itertools.pairwise(bounds)]
        return cls(ids, table["label"].to_numpy())


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
    config: TextsConfig, tokenizer: Tokenizer, seq_len: int, seed: int, folder: Folder
) -> Prepared:
    """Read, split and tokenize the labelled texts, once for all workers and restarts.

    Tokenization runs in Ray Data where Ray is connected.

    Raises:
        DataError: whatever is wrong with the texts or labels.
    """
    made_from = {**_made_from(config, tokenizer, seq_len), "seed": seed}
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
        parts = cut((str(text) for text in texts.texts), held, seed=seed)
        if not len(parts.held) or not len(parts.rest):
            raise DataError(
                f"finetune.validation_fraction={config.validation_fraction} sets "
                f"{len(parts.held):,} of {len(texts.labels):,} labelled texts apart to choose by "
                f"and leaves {len(parts.rest):,} to train on; change it, or give more texts"
            )
        train, validation = texts.take(parts.rest), texts.take(parts.held)
    head_tokens = max(1, round(seq_len * config.head_share))
    how = Preprocessing(seq_len, head_tokens, config.source.html_breaks)
    files = {
        name: _tokenize(part, tokenizer, how).save(folder, f"{name}.parquet")
        for name, part in (("train", train), ("validation", validation))
    }
    prepared = Prepared(
        made_from=made_from,
        **files,
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
    return {
        **config.model_dump(mode="json", include=used),
        "files": [sources.fingerprint(source, labels=True) for source in given],
        "tokenizer": tokenizer.hash,
        "seq_len": seq_len,
    }


def _tokenize(part: Labelled, tokenizer: Tokenizer, how: Preprocessing) -> Texts:
    return Texts(tokenize(part.texts, tokenizer, how), part.labels)
