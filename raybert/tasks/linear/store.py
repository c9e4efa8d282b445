"""Linear models in folders: tensors in a safetensors file, n-grams and scores in a JSON file.

A baseline's folder has `linear.*` and the outputs for the validation texts; a model directory with
an n-gram part has `ngrams.*`. The JSON file is written last and makes them complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as write_tensors

from raybert.errors import DamagedError, one_line
from raybert.storage.folder import Folder
from raybert.tasks.linear.baseline import Baseline
from raybert.tasks.linear.fitting import Weights
from raybert.tasks.linear.mixture import NgramPart
from raybert.tasks.linear.model import NgramModel, Weighting
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
    metrics, seconds = described.get("metrics"), described.get("seconds")
    if not isinstance(metrics, dict) or not isinstance(seconds, int | float):
        raise DamagedError(f"{folder.join(f'{_BASELINE}.json')} is damaged: it has no metrics")
    return Baseline(task, model, metrics, seconds, tensors.get(_VALIDATION))


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
    encoder, linear = described.get("encoder_weight"), described.get("linear_weight")
    if not isinstance(model, NgramModel) or encoder is None or linear is None:
        raise DamagedError(f"{folder.join(f'{_PART}.json')} is damaged: it is no n-gram part")
    return NgramPart(model, encoder, linear, task).calibrated()


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
        found |= {"weighting": list(model.weightings), "ngrams": list(model.ngrams.index)}
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
        described = _Described.model_validate(found)
        tensors = read_tensors(folder.read_bytes(f"{name}.safetensors"))
        weights = Weights(tensors["matrix"], tensors["bias"])
        task = TASKS[described.task](described.labels, described.fitted)
        task.check_fitted()
        model: NgramModel | WordModel = WordModel(weights)
        if described.ngrams is not None:
            index = {key: column for column, key in enumerate(described.ngrams)}
            model = NgramModel(described.weightings, Ngrams(index), tensors.get("idf"), weights)
        _check(model, len(task.labels), described.ngrams)
    except (FileNotFoundError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DamagedError(
            f"{folder.join(file)} is damaged ({reason}); delete it to use the encoder alone, or "
            "train again"
        ) from None
    return model, task, found, tensors


class _Described(BaseModel):
    """What is read of a JSON file."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    task: str
    labels: list[str]
    fitted: dict[str, Any]
    weighting: Weighting | list[Weighting] = "tf-idf"  # one alone was written as a string
    ngrams: list[str] | None = None
    encoder_weight: float | None = None
    linear_weight: float | None = None

    @property
    def weightings(self) -> tuple[Weighting, ...]:
        """Of a sum of models, one each."""
        return (self.weighting,) if isinstance(self.weighting, str) else tuple(self.weighting)


def _check(model: NgramModel | WordModel, num_labels: int, ngrams: list[str] | None) -> None:
    """Raise ValueError unless the tensors fit each other, and are finite."""
    tensors = [model.weights.matrix, model.weights.bias]
    rows = tensors[0].shape[:1]
    if ngrams is not None and isinstance(model, NgramModel):
        size, blocks = len(model.ngrams.index), len(model.weightings)
        per_block = rows[0] // blocks if blocks else 0
        if size < len(ngrams) or rows != (blocks * per_block,) or per_block not in (size, 3 * size):
            raise ValueError(f"{rows} rows of {size} n-grams")
        if (model.idf is None) != (set(model.weightings) == {"log-count ratio"}):
            raise ValueError(f"weighting={list(model.weightings)} does not fit the tensors")
        if model.idf is not None:
            tensors.append(model.idf)
            if model.idf.shape != (per_block,):
                raise ValueError(f"idf has the shape {model.idf.shape}")
    if tensors[0].shape != (*rows, num_labels) or tensors[1].shape != (num_labels,):
        raise ValueError(f"{tensors[1].shape} biases of {num_labels} labels")
    for tensor in tensors:
        if not np.issubdtype(tensor.dtype, np.floating) or not np.isfinite(tensor).all():
            raise ValueError("a tensor holds no finite numbers")
