"""Decide whether a fine-tuned model keeps the linear baseline beside its encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.experiment import Experiment
from raybert.pipeline.baseline_stage import folder_of
from raybert.storage.folder import Folder
from raybert.terminal.display import Display

if TYPE_CHECKING:
    from raybert.tasks.finetune import FinetuneSpec


def add_ngrams(experiment: Experiment, display: Display, spec: FinetuneSpec, model: Folder) -> None:
    """Give a model an n-gram part, if it is configured, or better on the validation texts."""
    from raybert.inference.classifier import TextClassifier
    from raybert.tasks.comparison import Predictions, paired_difference
    from raybert.tasks.linear.mixture import fit_part
    from raybert.tasks.linear.model import NgramModel
    from raybert.tasks.linear.store import load_baseline, save_part

    how, baseline = experiment.finetune.ngrams, load_baseline(folder_of(experiment))
    if how == "off" or baseline is None or not isinstance(baseline.model, NgramModel):
        return
    classifier = TextClassifier(model, precision="fp32")
    if classifier.ngrams is not None or classifier.labels != baseline.task.labels:
        return
    display.progress("n-grams: scoring the validation texts")
    texts = spec.read_texts()[1].shortened(
        Preprocessing(spec.prepared.seq_len, spec.prepared.head_tokens),
        Tokenizer.load(spec.tokenizer),
    )
    targets, linear = np.asarray(texts.labels), baseline.validation
    if linear is None or len(linear) != len(targets):
        return
    encoder = np.asarray(classifier.score(texts.input_ids))
    part = fit_part(classifier.task, baseline.model, encoder, linear, targets)
    ours = Predictions(part.task, part.add(encoder, linear), targets)
    alone = Predictions(classifier.task, encoder, targets)
    difference = paired_difference(ours, alone)
    metric = classifier.task.default_metric
    values = [
        m.task.validate(m.outputs, m.targets)[metric]
        for m in (ours, alone, Predictions(baseline.task, linear, targets))
    ]
    is_kept = how == "on" or difference.low > 0
    if is_kept:
        save_part(part, model)
    display.print(
        f"n-grams   validation {metric} {values[0]:.4f} with n-grams, {values[1]:.4f} of the "
        f"encoder, {values[2]:.4f} of n-grams alone: "
        + ("kept; finetune.ngrams=off leaves them out" if is_kept else "left out")
    )
