"""Which texts each stage reads: those that the configuration names, or those of the stage before.

A corpus that is built names its source, fine-tuning inherits the corpus's, evaluation inherits
fine-tuning's. Nothing else is read: without a name, the user is asked for one.
"""

from __future__ import annotations

from typing import Any, TypeVar

from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.data.sources.columns import with_columns_of
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError
from raybert.experiment import Experiment

#: Settings that say how much of a source a stage reads: each stage has its own.
_OWN = frozenset({"path", "split", "limit"})

S = TypeVar("S", bound=SourceConfig)


def with_sources(experiment: Experiment) -> Experiment:
    """The experiment with the sources that its stages inherit; an unnamed one stays so."""
    corpus, finetune, evaluate = experiment.corpus, experiment.finetune, experiment.evaluate
    source = corpus.source
    folder = experiment.folder / "corpus"
    if source.path is None and folder.exists(MANIFEST):
        source = _inherit(source, Manifest.read(folder).source)
    remembered = {"text_column": source.text_column}
    update: dict[str, Any] = {"source": source}
    if corpus.overlap is not None:
        update["overlap"] = with_columns_of(corpus.overlap, remembered)
    corpus = corpus.model_copy(update=update)
    labelled = finetune.source
    if labelled.path is None:
        labelled = _inherit(labelled, source)
    else:
        labelled = with_columns_of(labelled, remembered)
    columns = {"text_column": labelled.text_column}
    distill, unlabelled = finetune.distill, finetune.unlabelled
    if distill.unlabelled is not None:
        found = with_columns_of(distill.unlabelled, columns)
        distill = distill.model_copy(update={"unlabelled": found})
    if unlabelled is not None:
        unlabelled = with_columns_of(unlabelled, columns)
    finetune = finetune.model_copy(
        update={"source": labelled, "distill": distill, "unlabelled": unlabelled}
    )
    if evaluate.source.path is None:
        evaluate = evaluate.model_copy(update={"source": _inherit(evaluate.source, labelled)})
    sections = {"corpus": corpus, "finetune": finetune, "evaluate": evaluate}
    return experiment.model_copy(update=sections)


def _inherit(source: S, parent: SourceConfig | None) -> S:
    """The parent's texts, with the parent's settings where the source has the default ones."""
    if parent is None or parent.path is None:
        return source
    update = {"path": parent.path}
    for name, field in type(source).model_fields.items():
        if name not in _OWN and getattr(source, name) == field.default:
            update[name] = getattr(parent, name)
    return source.model_copy(update=update)


def require_source(source: SourceConfig, key: str) -> None:
    """Raise ConfigError for a source that neither the configuration nor a stage before names."""
    if source.path is not None:
        return
    what = "your texts" if key == "corpus.source" else "your labelled texts"
    raise ConfigError(
        f"{key}.path is not set; name {what} with --data FILE or --set {key}.path=FILE, or "
        "sample:imdb, the embedded movie reviews"
    )
