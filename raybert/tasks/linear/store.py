"""A baseline in a folder: `linear.safetensors`, and `linear.json` with its n-grams and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as write_tensors

from raybert.storage.folder import Folder
from raybert.tasks.linear.baseline import Baseline
from raybert.tasks.linear.model import NgramModel, Weights
from raybert.tasks.linear.ngrams import Ngrams
from raybert.tasks.linear.words import WordModel
from raybert.tasks.registry import TASKS

TENSORS, DESCRIPTION = "linear.safetensors", "linear.json"


def save_baseline(baseline: Baseline, folder: Folder) -> None:
    """Write a baseline; `linear.json` last, which makes it complete."""
    model = baseline.model
    tensors = {"matrix": model.weights.matrix, "bias": model.weights.bias}
    described: dict[str, Any] = {
        "task": baseline.task.name,
        "labels": baseline.task.labels,
        "fitted": dict(baseline.task.fitted),
        "metrics": baseline.metrics,
        "seconds": baseline.seconds,
    }
    if isinstance(model, NgramModel):
        if model.idf is not None:
            tensors["idf"] = model.idf
        described |= {"weighting": model.weighting, "ngrams": list(model.ngrams.index)}
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    folder.write_bytes(TENSORS, write_tensors(contiguous))
    folder.write_json(DESCRIPTION, described)


def load_baseline(folder: Folder) -> Baseline | None:
    """Read a baseline; None where there is none."""
    if not folder.exists(DESCRIPTION):
        return None
    described = folder.read_json(DESCRIPTION)
    tensors = read_tensors(folder.read_bytes(TENSORS))
    weights = Weights(tensors["matrix"], tensors["bias"])
    model: NgramModel | WordModel = WordModel(weights)
    if "ngrams" in described:
        index = {name: column for column, name in enumerate(described["ngrams"])}
        model = NgramModel(described["weighting"], Ngrams(index), tensors.get("idf"), weights)
    task = TASKS[described["task"]](described["labels"], described["fitted"])
    return Baseline(task, model, described["metrics"], described["seconds"])
