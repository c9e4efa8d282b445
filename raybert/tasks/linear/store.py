"""Linear models in folders: tensors in a safetensors file, n-grams and scores in a JSON file.

A baseline's folder has `linear.*` and the outputs for the validation texts; a model directory with
an n-gram part has `ngrams.*`. The JSON file is written last and makes them complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as write_tensors

from raybert.errors import DamagedError
from raybert.storage.folder import Folder
from raybert.tasks.linear.baseline import Baseline
from raybert.tasks.linear.mixture import NgramPart
from raybert.tasks.linear.model import NgramModel, Weights
from raybert.tasks.linear.ngrams import Ngrams
from raybert.tasks.linear.words import WordModel
from raybert.tasks.protocol import F32, TextTask
from raybert.tasks.registry import TASKS

_BASELINE, _PART = "linear", "ngrams"
_VALIDATION = "validation"  # outputs, [n, L]

_Arrays = dict[str, npt.NDArray[Any]]


def save_baseline(baseline: Baseline, folder: Folder) -> None:
    """Write a baseline."""
    extra = {} if baseline.validation is None else {_VALIDATION: baseline.validation}
    described = {"metrics": baseline.metrics, "seconds": baseline.seconds}
    _save(folder, _BASELINE, baseline.model, baseline.task, described, extra)


def load_baseline(folder: Folder) -> Baseline | None:
    """Read a baseline; None where there is none."""
    found = _load(folder, _BASELINE)
    if found is None:
        return None
    model, task, described, tensors = found
    return Baseline(
        task, model, described["metrics"], described["seconds"], tensors.get(_VALIDATION)
    )


def save_part(part: NgramPart, folder: Folder) -> None:
    """Write the n-gram part of a model into the model's directory."""
    weights = {"encoder_weight": part.encoder_weight, "linear_weight": part.linear_weight}
    _save(folder, _PART, part.model, part.task, weights, {})


def load_part(folder: Folder) -> NgramPart | None:
    """Read the n-gram part of a model; None where it has none.

    Raises:
        DamagedError: its files do not fit together.
    """
    found = _load(folder, _PART)
    if found is None:
        return None
    model, task, described, _ = found
    assert isinstance(model, NgramModel)
    return NgramPart(model, described["encoder_weight"], described["linear_weight"], task)


def _save(
    folder: Folder,
    name: str,
    model: NgramModel | WordModel,
    task: TextTask,
    described: Mapping[str, Any],
    extra: Mapping[str, F32],
) -> None:
    tensors: _Arrays = {"matrix": model.weights.matrix, "bias": model.weights.bias, **extra}
    found = {"task": task.name, "labels": task.labels, "fitted": dict(task.fitted), **described}
    if isinstance(model, NgramModel):
        if model.idf is not None:
            tensors["idf"] = model.idf
        found |= {"weighting": model.weighting, "ngrams": list(model.ngrams.index)}
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    folder.write_bytes(f"{name}.safetensors", write_tensors(contiguous))
    folder.write_json(f"{name}.json", found)


def _load(
    folder: Folder, name: str
) -> tuple[NgramModel | WordModel, TextTask, dict[str, Any], _Arrays] | None:
    file = f"{name}.json"
    if not folder.exists(file):
        return None
    try:
        found = folder.read_json(file)
        tensors = read_tensors(folder.read_bytes(f"{name}.safetensors"))
        weights = Weights(tensors["matrix"], tensors["bias"])
        model: NgramModel | WordModel = WordModel(weights)
        if "ngrams" in found:
            index = {key: column for column, key in enumerate(found["ngrams"])}
            model = NgramModel(found["weighting"], Ngrams(index), tensors.get("idf"), weights)
        task = TASKS[found["task"]](found["labels"], found["fitted"])
        if weights.bias.shape != (len(task.labels),):
            raise ValueError(f"{weights.bias.shape} biases of {len(task.labels)} labels")
    except (FileNotFoundError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DamagedError(
            f"{folder.join(file)} is damaged ({type(error).__name__}: {error}); delete it to use "
            "the encoder alone, or train again"
        ) from None
    return model, task, found, tensors
