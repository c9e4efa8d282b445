"""The best of the linear models on the texts of a fine-tuning run, scored as the run is.

It answers whether the encoder is worth its time: both read the same texts and splits, and are
compared on the same held-out texts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers.pre_tokenizers import BertPreTokenizer

from raybert.tasks.comparison import Predictions, paired_difference
from raybert.tasks.entities import Word
from raybert.tasks.labelled import Labelled
from raybert.tasks.linear.features import NgramFeatures
from raybert.tasks.linear.model import NgramModel
from raybert.tasks.linear.words import WordModel, fit_words
from raybert.tasks.protocol import F32, Metrics, Outputs, TextTask

#: Of the training texts, a sample; more would take minutes.
MAX_TEXTS = 100_000
#: Of texts without labels: the singular vectors of 20,000 take 15 s.
MAX_UNLABELLED = 30_000


@dataclass(frozen=True)
class Baseline:
    """A fitted linear model and the task with what was fitted for it on validation texts."""

    task: TextTask
    model: NgramModel | WordModel
    metrics: Metrics  # on the validation texts
    seconds: float
    validation: F32 | None = None  # outputs for the validation texts, [n, L]; None: of words

    @property
    def description(self) -> str:
        """What the model is, for the user."""
        if isinstance(self.model, WordModel):
            return "logistic regression on words and their neighbours"
        kind = "ridge" if self.task.output_kind == "number" else "logistic"
        ngrams = "1- and 2-grams" if self.model.ngrams.longest < 3 else "1- to 3-grams"
        return f"{kind} regression on {ngrams}, {' + '.join(self.model.weightings)}"

    @property
    def summary(self) -> dict[str, Any]:
        """What results keep of it."""
        return {
            "description": self.description,
            "metrics": self.metrics,
            "seconds": round(self.seconds, 1),
        }

    def outputs(self, texts: Labelled) -> Outputs:
        """The outputs for texts: [n, L], or of the words of each [W, L]."""
        if isinstance(self.model, WordModel):
            return [self.model.outputs(words) for words in _words(texts)]
        return self.model.outputs(strings(texts))

    def predictions(self, texts: Labelled) -> Predictions:
        """The outputs and the targets of labelled texts."""
        task = self.task
        targets = word_targets(task, texts) if task.is_per_token else targets_of(task, texts)
        return Predictions(task, self.outputs(texts), targets)


def beside_baseline(ours: Predictions, baseline: Baseline, texts: Labelled) -> Metrics:
    """The baseline's scores on the texts of `ours`, and how much better `ours` are."""
    metric = ours.task.default_metric
    theirs = baseline.predictions(texts)
    difference = paired_difference(ours, theirs)
    scores = theirs.task.validate(theirs.outputs, theirs.targets)
    return {
        **baseline.summary,
        "metrics": scores,
        "metric": metric,
        "difference": difference.value,
        "interval": [difference.low, difference.high],
    }


def fit_baseline(
    task: TextTask,
    train: Labelled,
    validation: Labelled,
    *,
    metric: str | None = None,
    seed: int = 0,
    unlabelled: Sequence[str] = (),
    refit: bool = False,
) -> Baseline:
    """Fit the linear models of a task, and return the one with the best validation metric.

    Args:
        task: what the outputs mean.
        train: the texts to fit on; of many, `seed` draws a sample.
        validation: the texts whose `metric` chooses; None: the task's.
        metric: a name of `task.selection_metrics`.
        seed: of the sample.
        unlabelled: further texts, which one more model learns from where they are the most.
        refit: as `fit_best`.
    """
    begun = time.monotonic()
    labelled = np.flatnonzero(~np.asarray(train.labels.is_null()))
    if len(labelled) > MAX_TEXTS:
        labelled = np.sort(np.random.default_rng(seed).choice(labelled, MAX_TEXTS, replace=False))
    train = train.take(labelled)
    if task.is_per_token:
        model = fit_words(_words(train), word_targets(task, train), len(task.labels))
        outputs: Outputs = [model.outputs(words) for words in _words(validation)]
        found = _best(task, [(model, outputs)], word_targets(task, validation), metric)
    else:
        texts, others = strings(train), list[tuple[str, ...]]()
        if len(unlabelled) > len(texts) and train.pairs is None:
            others = [(text,) for text in unlabelled[:MAX_UNLABELLED]]
        found = fit_best(
            task, texts, targets_of(task, train), validation, others, metric=metric, refit=refit
        )
    return replace(found, seconds=time.monotonic() - begun)


def fit_best(
    task: TextTask,
    texts: Sequence[tuple[str, ...]],
    targets: npt.NDArray[Any],
    validation: Labelled,
    unlabelled: Sequence[tuple[str, ...]] = (),
    *,
    metric: str | None = None,
    refit: bool = False,
) -> Baseline:
    """Fit linear models on n-grams of texts, and return the one with the best validation metric.

    With `refit` it is then fitted on the validation texts, too. Its metrics and its outputs for
    them stay those of the model that had not seen them.
    """
    together = [*texts, *unlabelled]
    features = NgramFeatures(together, task.output_kind, len(task.labels), len(texts))
    fitted, scored = np.arange(len(texts)), features.extend(strings(validation))
    wanted = targets_of(task, validation)
    models = features.fit_candidates(fitted, targets, latent=bool(unlabelled))
    outputs = [(model, features.outputs(model, scored)) for model in models]
    found = _best(task, outputs, wanted, metric)
    if refit and isinstance(found.model, NgramModel):
        rows, known = np.concatenate([fitted, scored]), np.concatenate([targets, wanted])
        found = replace(found, model=features.fit(found.model.weightings, rows, known))
    return found


def _best(
    task: TextTask,
    scored: Sequence[tuple[NgramModel | WordModel, Outputs]],
    targets: Any,
    metric: str | None,
) -> Baseline:
    """The model with the best metric, of models and their outputs for the validation texts."""
    metric, candidates = metric or task.default_metric, []
    for model, outputs in scored:
        fitted = task.fit(outputs, targets)
        scores = fitted.validate(outputs, targets)
        value = scores[metric] if task.selection_metrics[metric] else -scores[metric]
        kept = outputs if isinstance(outputs, np.ndarray) else None
        candidates.append((value, Baseline(fitted, model, scores, 0.0, kept)))
    return max(candidates, key=lambda found: found[0])[1]


def targets_of(task: TextTask, texts: Labelled) -> npt.NDArray[Any]:
    """The targets of labelled texts, for a task on whole texts."""
    return task.targets(texts.labels.to_pylist())


def word_targets(task: TextTask, texts: Labelled) -> list[npt.NDArray[np.int64]]:
    """The target of each word of each text, for a task on tokens."""
    pairs = zip(texts.labels.to_pylist(), texts.texts.to_pylist(), strict=True)
    found = ((label, words_of(text)) for label, text in pairs)
    return [task.token_targets(label, words, len(words)) for label, words in found]


def words_of(text: str) -> list[Word]:
    """The words of a text, as BERT splits it; their numbers stand for their tokens."""
    split = BertPreTokenizer().pre_tokenize_str(text)
    return [Word(start, end, number) for number, (_, (start, end)) in enumerate(split)]


def _words(texts: Labelled) -> list[list[str]]:
    return [
        [text[word.start : word.end] for word in words_of(text)] for text in texts.texts.to_pylist()
    ]


def strings(texts: Labelled) -> list[tuple[str, ...]]:
    """The texts, or the two texts of each pair."""
    columns: list[pa.ChunkedArray] = [texts.texts]
    if texts.pairs is not None:
        columns.append(texts.pairs)
    return list(zip(*(column.to_pylist() for column in columns), strict=True))
