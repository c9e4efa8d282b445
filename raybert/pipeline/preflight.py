"""Mistakes in names of files and columns, found before PyTorch and Ray are imported.

What needs more than a first row (labels, lengths, models) is checked by the stages, before Ray
starts. Only sources that the configuration names are read here: the others are inherited ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from raybert.config import build
from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.data.sources import documents
from raybert.data.sources.columns import with_columns_of, with_usual_columns
from raybert.data.sources.settings import EvaluationSource, SourceConfig
from raybert.errors import ConfigError, RaybertError, UserError
from raybert.inference.prediction_file import check_output
from raybert.storage.folder import Folder

#: Sources of each stage whose columns may be inherited; only whether they are there is checked.
_FURTHER: dict[str, list[tuple[str, type[SourceConfig]]]] = {
    "corpus": [("corpus.overlap", EvaluationSource)],
    "finetune": [
        ("finetune.validation", SourceConfig),
        ("finetune.distill.unlabelled", SourceConfig),
        ("finetune.unlabelled", SourceConfig),
    ],
    "evaluate": [("evaluate.source", EvaluationSource)],
}
_CONFIG = "config.yaml"  # in the folder of a run that has begun, which reads what it prepared


def check_sources(values: Mapping[str, Any], stages: Iterable[str], run: str = "finetune") -> None:
    """Raise UserError for a source that is not there, or lacks a column.

    `values` are the configuration's, not validated; `run` is the folder of the fine-tuning.
    """
    corpus = _source(values, "corpus.source", SourceConfig)
    for stage in stages:
        if stage == "finetune" and _exists(values, run, _CONFIG):
            continue
        if stage == "corpus" and corpus is not None:
            peek_corpus(corpus)
        labelled = _source(values, "finetune.source", SourceConfig)
        if stage == "finetune" and labelled is not None:
            documents.shards(labelled, labels=True)
            columns = {"text_column": _text_column(values, corpus)}
            resolved, _ = with_usual_columns(with_columns_of(labelled, columns))
            documents.raw_rows(resolved, 1)
        for key, kind in _FURTHER[stage]:
            source = _source(values, key, kind)
            if source is not None:
                documents.shards(source, labels=stage != "corpus")


def peek_corpus(source: SourceConfig) -> None:
    """Raise UserError for a source that is not there, or whose first file lacks a column."""
    next(documents.read(documents.shards(source)[0], source), None)


def check_prediction(path: str, output: str, text_column: str | None) -> None:
    """Raise UserError if there are no texts at a path, or predictions can't be written."""
    check_output(output)
    source = SourceConfig(path=path)
    shards = documents.shards(source)
    written = None if "://" in output else os.path.realpath(os.path.expanduser(output))
    if any(file.uri == written for shard in shards for file in shard.files):
        raise UserError(f"--output {output}: is a file that --input reads; name another one")
    if text_column is not None:  # else the model says which column it reads
        peek_corpus(source.model_copy(update={"text_column": text_column}))


def _source(values: Mapping[str, Any], key: str, kind: type[SourceConfig]) -> SourceConfig | None:
    """A source that the values name; None for one that is inherited, or not valid."""
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or node.get("path") is None:
        return None
    try:
        return build(kind, node, key)
    except ConfigError:  # the whole configuration is validated later, with remedies
        return None


def _text_column(values: Mapping[str, Any], corpus: SourceConfig | None) -> str | None:
    """The column of texts that the corpus has or will have."""
    if corpus is None and _exists(values, "corpus", MANIFEST):
        with suppress(RaybertError):
            corpus = Manifest.read(_folder(values) / "corpus").source
    return None if corpus is None else corpus.text_column


def _folder(values: Mapping[str, Any]) -> Folder:
    given = values.get("run")
    names = given if isinstance(given, Mapping) else {}
    return Folder(str(names.get("storage", "runs"))) / str(names.get("name", "default"))


def _exists(values: Mapping[str, Any], stage: str, name: str) -> bool:
    try:
        return (_folder(values) / stage).exists(name)
    except RaybertError:  # the stages report a storage that can't be read
        return False
