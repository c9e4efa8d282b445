"""Evaluate a classifier on held-out labelled texts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.inference.bulk import logits_of, score
from raybert.inference.classifier import softmax
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.classification_metrics import classification_scores

_WRONG_EXAMPLES, _RIGHT_EXAMPLES = 8, 4  # for the report, the most confident ones


def evaluate(
    source: SourceConfig,
    model: Folder,
    names: list[str],
    *,
    workers: int,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Score labelled texts with the classifier in `model`, whose labels are `names`.

    `workers` actors compute; `on_progress` gets the number of texts so far.

    Returns:
        `classification_scores`, with `texts_per_second`, `skipped` and `examples`.

    Raises:
        DataError: a label that the classifier does not know, or any bad row.
    """
    # The model's own preprocessing, as in training and in serving.
    breaks = huggingface.read_preprocessing(model).get("html_breaks", "space")
    source = source.model_copy(update={"labels": names, "html_breaks": breaks})
    skipped: Counter[str] = Counter()
    begun, tables, done = time.monotonic(), [], 0
    for table in score(source, model, labels=True, workers=workers, skipped=skipped):
        tables.append(table)
        done += len(table)
        on_progress(done)
    if not tables:
        raise DataError(f"{source.path}: no labelled texts")
    table = pa.concat_tables(tables)
    logits = np.concatenate([logits_of(part) for part in tables])
    # Calibrated, as in serving.
    logits = np.asarray(logits / huggingface.read_temperature(model), np.float32)
    ids = {name: index for index, name in enumerate(names)}
    labels = np.array([ids[name] for name in table["label"].to_pylist()])
    return {
        **classification_scores(logits, labels, names),
        "texts_per_second": round(done / max(1e-9, time.monotonic() - begun), 1),
        "skipped": dict(skipped),
        "examples": _examples(table, softmax(logits), labels, names),
    }


def _examples(table: pa.Table, probabilities: Any, labels: Any, names: list[str]) -> list[Any]:
    """The most confident wrong and right predictions, as the report shows them."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    right = np.flatnonzero(predicted == labels)
    chosen = [
        *wrong[np.argsort(-confidence[wrong])][:_WRONG_EXAMPLES],
        *right[np.argsort(-confidence[right])][:_RIGHT_EXAMPLES],
    ]
    return [
        {
            "text": table["text"][int(row)].as_py()[:1000],
            "label": names[labels[row]],
            "predicted": names[predicted[row]],
            "probability": round(float(confidence[row]), 4),
        }
        for row in chosen
    ]
