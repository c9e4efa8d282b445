"""Labelled texts, read, split and tokenized once for all workers and restarts of a run.

`prepare_texts` writes two Parquet files and, last, `data.json` with everything that decides their
content. A later call with the same content reads `data.json` and returns at once. Each worker loads
the files as `TokenizedTexts` and makes micro-batches of them.

Shapes: B texts, T tokens, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.config import Settings
from raybert.data.encoding import Ragged
from raybert.data.preprocess import Preprocessing, tokenize
from raybert.data.sources import documents
from raybert.data.sources.changes import changes, hash_files
from raybert.data.sources.columns import REMEMBERED
from raybert.data.sources.files import File
from raybert.data.sources.settings import SourceConfig
from raybert.data.tokenizer import Tokenizer
from raybert.data.unknown import UnknownCount, check_unknown, count_unknown
from raybert.errors import DataError
from raybert.storage.folder import Folder
from raybert.tasks.entities import words_of
from raybert.tasks.labelled import (
    Labelled,
    ResolvedSource,
    fold_rows,
    read_labelled,
    resolve_source,
    split_at_random,
    split_by_class,
    units_of,
)
from raybert.tasks.protocol import TextTask
from raybert.tasks.registry import TASKS
from raybert.tasks.settings import TextsConfig
from raybert.tasks.suspicions import shared_texts
from raybert.tasks.tokenized_texts import TextFile, TokenizedTexts, flatten

DATA_FILE = "data.json"

#: Computes a teacher's logits for texts, fp32 [rows, L].
Teach = Callable[[Labelled, TextTask], npt.NDArray[np.float32]]


#: Learns from a split, and from all texts with a teacher's logits for them.
FitStudent = Callable[["SplitTexts", Labelled, npt.NDArray[np.float32]], None]


class PreparedTexts(Settings):
    """The content of `data.json`."""

    made_from: dict[str, Any]
    train: TextFile
    validation: TextFile
    labels: list[str]
    seq_len: int
    head_tokens: int
    skipped: dict[str, int]
    task: str = "single_label"
    #: What was found out about the data, for the user; the columns that were read.
    description: str = ""
    columns: dict[str, Any] = {}
    #: Of the linear model on the same texts: description, metrics, seconds.
    baseline: dict[str, Any] | None = None
    sha256: dict[str, str] = {}  # of the files that were read, by name
    unknown: float | None = None  # the share of unknown tokens, where there are tokens
    cut: int = 0  # texts that were longer than `seq_len`
    warnings: list[str] = []

    def make_task(self) -> TextTask:
        """The task, with what the data says about it."""
        return TASKS[self.task](self.labels)

    @property
    def has_pairs(self) -> bool:
        """Whether the texts are pairs."""
        return self.columns.get("pair_column") is not None


def prepare_texts(
    config: TextsConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int,
    folder: Folder,
    *,
    teach: Teach | None = None,
    teacher: str = "",
    fold: tuple[int, int] | None = None,
    fit_baseline: Callable[[SplitTexts], dict[str, Any]] | None = None,
    fit_student: FitStudent | None = None,
) -> PreparedTexts:
    """Read, split and tokenize labelled texts, or return what an earlier call has prepared.

    Tokenization runs in Ray Data where Ray is connected. The seed decides which texts are set apart
    for validation, where none are given for it. `teach` computes the teacher's logits, and
    `teacher` is its hash. `fold` (i, n): validate on the i-th of n parts of the source.
    `fit_baseline` fits a linear model on the split and returns its description; `fit_student` gets
    the split, all texts to train on, and the teacher's logits for them. A DataError names a file,
    row or label that can't be used.
    """
    made_from = {**_made_from(config, tokenizer, seq_len), "seed": seed}
    if teach is not None:
        made_from["teacher"] = teacher
    if fold is not None:
        made_from["fold"] = list(fold)
    prepared = read_prepared_texts(folder)
    if prepared is not None and prepared.made_from == made_from:
        return prepared
    folder.delete(DATA_FILE)
    resolved = resolve_source(config.source, config.task)
    source = resolved.source
    split = read_and_split(config, resolved, seed, fold)
    train, validation, task, skipped = split
    warnings = [
        *task.suspicions(train.labels.to_pylist(), validation.labels.to_pylist(), source),
        *shared_texts(units_of(train, by_text=True), units_of(validation, by_text=True)),
    ]
    baseline = fit_baseline(split) if fit_baseline is not None else None
    if config.distill.unlabelled is not None:
        train = _add_unlabelled(config, train, validation, skipped)
    head_tokens = max(1, round(seq_len * config.head_share))
    if task.is_per_token:  # offsets are those of the raw text, and a text is read from its start
        preprocessing = Preprocessing(seq_len, seq_len, "keep")
    else:
        preprocessing = Preprocessing(seq_len, head_tokens, source.html_breaks)
    tokenized = {
        name: tokenize_labelled(part, task, tokenizer, preprocessing)
        for name, part in (("train", train), ("validation", validation))
    }
    unknown = _unknown_share([train, validation], list(tokenized.values()), tokenizer)
    unknown_warning = check_unknown(
        unknown,
        ", ".join(source.paths),
        "start from a model of this language: set finetune.initialize_from, or pretrain with "
        "corpus.tokenizer.kind=auto",
    )
    if teach is not None:
        logits = teach(train, task)
        tokenized["train"] = replace(tokenized["train"], teacher=logits)
        if fit_student is not None:
            fit_student(split, train, logits)
    sources = [*_sources(config), *filter(None, [config.distill.unlabelled])]
    prepared = PreparedTexts(
        made_from=made_from,
        **{name: part.save(folder, f"{name}.parquet") for name, part in tokenized.items()},
        labels=task.labels,
        seq_len=preprocessing.seq_len,
        head_tokens=preprocessing.head_tokens,
        skipped=dict(skipped),
        task=task.name,
        description=resolved.description,
        baseline=baseline,
        sha256=hash_files([f for source in sources for f in _files(config, source)]),
        unknown=unknown,
        cut=sum(part.cut for part in tokenized.values()),
        warnings=[*warnings, *([unknown_warning] if unknown_warning else [])],
        columns={name: getattr(source, name) for name in sorted(REMEMBERED)},
    )
    folder.write_json(DATA_FILE, prepared.model_dump())
    return prepared


def tokenize_labelled(
    part: Labelled, task: TextTask, tokenizer: Tokenizer, how: Preprocessing
) -> TokenizedTexts:
    """Tokenize texts and turn their labels into targets."""
    if task.is_per_token:
        return _tokenize_words(part, task, tokenizer, how)
    targets = task.targets_where_known(part.labels.to_pylist())
    if part.pairs is None:
        rows, is_cut = tokenize(part.texts, tokenizer, how)
        return TokenizedTexts(rows, targets, cut=sum(is_cut))
    pairs = how.encode_pairs(tokenizer, part.texts.to_pylist(), part.pairs.to_pylist())
    limit = how.seq_len  # of each text: more is never read
    firsts, seconds = ([pair[i][:limit] for pair in pairs] for i in (0, 1))
    cut = sum(how.cuts_pair(tokenizer, pair) for pair in pairs)
    return TokenizedTexts(firsts, targets, None, seconds, cut)


def _unknown_share(
    labelled: Sequence[Labelled], tokenized: Sequence[TokenizedTexts], tokenizer: Tokenizer
) -> float | None:
    """The share of the texts that is unknown to the tokenizer."""
    counted = UnknownCount()
    for part, texts in zip(labelled, tokenized, strict=True):
        for strings, ids in ((part.texts, texts.input_ids), (part.pairs, texts.seconds)):
            if strings is not None and ids:
                flat, offsets = flatten(ids)
                encoded = Ragged(flat, offsets, np.empty(0, np.bool_))
                counted = counted.plus(count_unknown(strings.to_pylist(), encoded, tokenizer))
    return counted.share


def _tokenize_words(
    part: Labelled, task: TextTask, tokenizer: Tokenizer, how: Preprocessing
) -> TokenizedTexts:
    input_ids, targets, cut = [], [], 0
    labels = part.labels.to_pylist()
    for label, encoding in zip(
        labels, tokenizer.hf.encode_batch(part.texts.to_pylist()), strict=True
    ):
        words = words_of(encoding)
        ids = np.array(encoding.ids, np.uint32)
        cut += how.cuts(ids)
        input_ids.append(how.shorten(ids))
        targets.append(how.shorten(task.token_targets(label, words, len(encoding.ids))))
    return TokenizedTexts(input_ids, targets, cut=cut)


def read_prepared_texts(folder: Folder) -> PreparedTexts | None:
    """Read what `prepare_texts` has written to a folder; None: nothing, or not all of it."""
    if not folder.exists(DATA_FILE):
        return None
    return PreparedTexts.model_validate(folder.read_json(DATA_FILE))


def check_same_texts(config: TextsConfig, folder: Folder) -> None:
    """Raise DataError if the texts that were prepared in a folder have changed since.

    Texts that were deleted have not: what was prepared of them stays.
    """
    prepared = read_prepared_texts(folder)
    if prepared is None:
        return
    unlabelled = prepared.made_from.get("unlabelled") or {}
    known = [*prepared.made_from.get("files", []), unlabelled.get("files", [])]
    for source, before in zip([*_sources(config), config.distill.unlabelled], known, strict=False):
        if source is None:
            continue
        try:
            files = _files(config, source)
        except DataError:
            continue
        by_name = {file.name: file for file in files}
        for change in changes(before, _identify(files), prepared.sha256, by_name):
            raise DataError(
                f"{folder} was prepared from {change.name} {change.before}, now {change.now}; "
                "restore it, or choose another run.name"
            )


def _sources(config: TextsConfig) -> list[SourceConfig]:
    """The labelled sources."""
    return [config.source, *([config.validation] if config.validation else [])]


def _files(config: TextsConfig, source: SourceConfig) -> list[File]:
    labels = source is not config.distill.unlabelled
    return [f for shard in documents.shards(source, labels=labels) for f in shard.files]


def _identify(files: Sequence[File]) -> list[list[Any]]:
    """As `documents.fingerprint`."""
    return [[file.name, file.size, file.mtime] for file in files]


def _made_from(config: TextsConfig, tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """Everything that decides the result of `prepare_texts`, but the seed and the teacher."""
    used = {"validation_fraction", "head_share"}
    made_from = {
        **config.model_dump(mode="json", include=used),
        "source": config.source.identity(),
        "validation": None if config.validation is None else config.validation.identity(),
        "files": [_identify(_files(config, source)) for source in _sources(config)],
        "tokenizer": tokenizer.hash,
        "seq_len": seq_len,
    }
    if config.task != "auto":
        made_from["task"] = config.task
    if config.validation_split != "random":
        made_from["validation_split"] = config.validation_split
    unlabelled = config.distill.unlabelled
    if unlabelled is not None:
        files = _identify(_files(config, unlabelled))
        made_from["unlabelled"] = {**unlabelled.identity(), "files": files}
    return made_from


class SplitTexts(NamedTuple):
    """Labelled texts to train and to validate on, their task, and skipped rows by reason."""

    train: Labelled
    validation: Labelled
    task: TextTask
    skipped: Counter[str]


def read_and_split(
    config: TextsConfig,
    resolved: ResolvedSource,
    seed: int,
    fold: tuple[int, int] | None = None,
) -> SplitTexts:
    """Read the texts to train on and those to validate on; the seed chooses, or `fold` (i, n).

    Raises:
        DataError: a row or label that can't be used, or too few texts.
    """
    task, skipped = resolved.task, Counter[str]()
    config = config.model_copy(update={"source": resolved.source})
    texts = read_labelled(config.source, task)
    names = task.find_labels(texts.labels.unique().to_pylist(), config.source)
    skipped.update(texts.skipped)
    if config.validation is not None and fold is None:
        columns = ("text_column", "label_column", "pair_column", "label_separator", "html_breaks")
        update = {name: getattr(config.source, name) for name in columns}
        given = config.validation.model_dump(exclude_unset=True)
        source = config.validation.model_copy(
            update={k: v for k, v in update.items() if k == "html_breaks" or k not in given}
        )
        validation = read_labelled(source, task, names)
        skipped.update(validation.skipped)
        return SplitTexts(texts, validation, task(names), skipped)
    units = units_of(texts)
    fraction = config.validation_fraction
    if fold is not None:
        classes = task(names).groups(texts.labels.to_pylist())
        parts = fold_rows(units, classes, *fold, seed=seed)
    elif config.validation_split == "stratified":
        classes = task(names).groups(texts.labels.to_pylist())
        parts = split_by_class(units, classes, fraction, seed=seed)
    else:
        classes = task(names).groups(texts.labels.to_pylist())
        parts = split_at_random(units, classes, fraction, seed=seed)
    if not len(parts.heldout) or not len(parts.rest):
        if fold is not None:
            raise DataError(
                f"--folds={fold[1]}: part {fold[0] + 1} has {len(parts.heldout):,} of the "
                f"{len(units):,} labelled texts; choose fewer folds, or give more texts"
            )
        raise DataError(
            f"finetune.validation_fraction={config.validation_fraction} sets "
            f"{len(parts.heldout):,} of {len(units):,} labelled texts apart for validation "
            f"and leaves {len(parts.rest):,} for training; change it, or give more texts"
        )
    return SplitTexts(texts.take(parts.rest), texts.take(parts.heldout), task(names), skipped)


def unlabelled_texts(
    config: TextsConfig, source: SourceConfig, skipped: Counter[str] | None = None
) -> Iterator[str]:
    """Texts of a source without labels, with their line breaks as those of labelled texts."""
    source = source.model_copy(update={"html_breaks": config.source.html_breaks})
    for table in documents.documents(source, skipped=skipped):
        yield from table["text"].to_pylist()


def _add_unlabelled(
    config: TextsConfig, train: Labelled, validation: Labelled, skipped: Counter[str]
) -> Labelled:
    """Add the unlabelled texts; those that are labelled, too, may be held out and are skipped."""
    assert config.distill.unlabelled is not None
    known = {*train.texts.to_pylist(), *validation.texts.to_pylist()}
    found = list(unlabelled_texts(config, config.distill.unlabelled, skipped))
    texts = [text for text in found if text not in known]
    if len(texts) < len(found):
        skipped["labelled elsewhere"] += len(found) - len(texts)
    return train._replace(
        texts=pa.chunked_array([*train.texts.chunks, pa.array(texts, pa.string())]),
        labels=pa.chunked_array([*train.labels.chunks, pa.nulls(len(texts), pa.string())]),
    )
