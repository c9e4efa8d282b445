"""Labelled texts, read, split and tokenized once for all workers and restarts of a run.

`prepare_texts` writes two Parquet files and, last, `data.json` with everything that decides their
content. A later call with the same content reads `data.json` and returns at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.config import Settings
from raybert.data.preprocess import Preprocessing, tokenize
from raybert.data.sources import documents
from raybert.data.sources.documents import Labelled, labelled, split_rows
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DataError
from raybert.storage.folder import Folder
from raybert.tasks.settings import TextsConfig
from raybert.tasks.tokenized_texts import NO_LABEL, TextFile, TokenizedTexts

DATA_FILE = "data.json"

#: Computes a teacher's logits for texts, fp32 [rows, L]; the second argument names the L labels.
Teach = Callable[[pa.ChunkedArray, list[str]], npt.NDArray[np.float32]]


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
            f"{len(parts.heldout):,} of {len(texts.labels):,} labelled texts apart to choose by "
            f"and leaves {len(parts.rest):,} to train on; change it, or give more texts"
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
