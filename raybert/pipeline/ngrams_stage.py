"""Decide whether a fine-tuned model keeps the linear baseline beside its encoder.

`mixture.json` in a stage's folder says that it was decided. A stage that was killed before that
decides when it is run again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raybert.data.tokenizer import Tokenizer
from raybert.experiment import Experiment
from raybert.storage.folder import Folder
from raybert.terminal.display import Display

if TYPE_CHECKING:
    from raybert.tasks.protocol import TextTask

DECISION = "mixture.json"


def add_ngrams(
    experiment: Experiment, display: Display, run: Folder, baseline_folder: Folder
) -> bool:
    """Give the model of a run an n-gram part, if it is configured, or better on validation texts.

    `run` has `data/` and `model/`, whose texts the baseline was fitted on, too. Returns whether the
    model has changed.
    """
    from raybert.tasks.linear.decision import try_part
    from raybert.tasks.linear.model import NgramModel
    from raybert.tasks.linear.store import load_baseline, save_part

    how, model = experiment.finetune.ngrams, run / "model"
    if how == "off" or run.exists(DECISION) or model.exists("ngrams.json"):
        return False
    if not (run.exists("data/data.json") and model.exists("config.json")):
        return False
    baseline = load_baseline(baseline_folder)
    if baseline is None or not isinstance(baseline.model, NgramModel):
        return False
    display.progress("n-grams: scoring the validation texts")
    task, encoder, targets = score_validation(model, run / "data")
    linear = baseline.validation
    if task.labels != baseline.task.labels or linear is None or len(linear) != len(targets):
        return False
    tried = try_part(task, baseline.model, baseline.task, encoder, linear, targets)
    is_kept = how == "on" or tried.difference.low > 0
    if is_kept:
        save_part(tried.part, model)
    both, alone, ngrams = tried.values
    run.write_json(
        DECISION, {"kept": is_kept, "metric": tried.metric, "with": both, "alone": alone}
    )
    display.print(
        f"n-grams   validation {tried.metric} {both:.4f} with n-grams, {alone:.4f} of the "
        f"encoder, {ngrams:.4f} of n-grams alone: "
        + ("kept; finetune.ngrams=off leaves them out" if is_kept else "left out")
    )
    return is_kept


class Validated(NamedTuple):
    """What a model says of the validation texts."""

    task: TextTask
    outputs: npt.NDArray[np.float32]  # [n, L]
    targets: npt.NDArray[Any]


def score_validation(model: Folder, data: Folder, baseline: Folder | None = None) -> Validated:
    """Score the validation texts of prepared `data`, with the n-gram part if the model has one.

    `baseline` is the folder of the linear model of that part; None: the encoder alone.
    """
    from raybert.inference.classifier import TextClassifier
    from raybert.tasks.linear.store import load_baseline
    from raybert.tasks.prepared_texts import read_prepared_texts
    from raybert.tasks.tokenized_texts import TokenizedTexts

    classifier = TextClassifier(model, precision="fp32")
    prepared = read_prepared_texts(data)
    assert prepared is not None
    texts = TokenizedTexts.load(data, prepared.validation)
    texts = texts.shortened(classifier.preprocessing, Tokenizer.load(model))
    outputs = np.asarray(classifier.score(texts.input_ids))
    fitted = None if baseline is None or classifier.ngrams is None else load_baseline(baseline)
    if fitted is not None:
        outputs = np.asarray(classifier.with_ngrams(outputs, fitted.validation))
    return Validated(classifier.task, outputs, np.asarray(texts.labels))
