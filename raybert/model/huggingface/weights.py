"""The weights of a model directory: read, checked against a model's shapes, copied, written.

One file, `model.safetensors`, or several that `model.safetensors.index.json` names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from raybert.errors import DamagedError, UserError, one_line
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.huggingface.finite import DIVERGED
from raybert.model.huggingface.parameter_names import layers_in, transformers_names
from raybert.model.huggingface.transformers_classifier import TransformersClassifier
from raybert.storage.folder import Folder

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: fp32 arrays by their names in the file.
Weights = Mapping[str, npt.NDArray[Any]]


class _Index(BaseModel):
    """The content of `model.safetensors.index.json`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    weight_map: dict[str, str]  # tensor -> file


def serialize(model: MaskedLM | Classifier, temperature: float = 1.0) -> bytes:
    """The content of `model.safetensors`: fp32 tensors under the names of transformers.

    `temperature` divides a classifier's logits.
    """
    tensors = {}
    if isinstance(model, TransformersClassifier):
        tensors = model.tensors(temperature)
    else:
        for name, tensor in model.state_dict().items():
            if name.startswith("classifier.") and temperature != 1.0:
                tensor = tensor / temperature
            names = transformers_names(name, model.encoder.config.layout)
            tensors.update(zip(names, tensor.chunk(len(names)), strict=True))
    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    data: bytes = safetensors.torch.save(plain, {"format": "pt"})
    return data


def weight_files(folder: Folder) -> list[str]:
    """The names of the files with the weights; a UserError if there are none."""
    if folder.exists(WEIGHTS_FILE):
        return [WEIGHTS_FILE]
    if folder.exists(INDEX_FILE):
        return sorted(set(_read_index(folder).values()))
    if folder.exists("pytorch_model.bin"):
        raise UserError(
            f"{folder} holds pytorch_model.bin, which raybert does not open: unpickling it can "
            "run any code; convert it with transformers' save_pretrained to "
            f"{WEIGHTS_FILE}"
        )
    raise UserError(
        f"{folder} has no weights: {WEIGHTS_FILE} is missing; copy it there, beside config.json"
    )


def _read_index(folder: Folder) -> dict[str, str]:
    """The file of each tensor."""
    where = folder.join(INDEX_FILE)
    try:
        found = _Index.model_validate(folder.read_json(INDEX_FILE)).weight_map
    except ValidationError as error:
        raise DamagedError(f"{where} is damaged: {one_line(error)}") from None
    for file in found.values():
        if not file.endswith(".safetensors") or "/" in file or not file.isprintable():
            raise DamagedError(f"{where} is damaged: {file!r} is no safetensors file beside it")
    if not found:
        raise DamagedError(f"{where} is damaged: weight_map names no tensor")
    return found


def read_tensors(folder: Folder) -> dict[str, Tensor]:
    """Read the weights, under the names that transformers uses today."""

    def modern(name: str) -> str:  # BERT's first checkpoints have TensorFlow's names here
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        return name.replace("LayerNorm.beta", "LayerNorm.bias")

    return {modern(name): tensor for name, tensor in _load(folder)[0].items()}


def check_weights(folder: Folder) -> str:
    """Raise for missing, damaged or diverged weights; return `weights_hash` of the same bytes."""
    tensors, digest = _load(folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise _not_finite(str(folder), name)
    return digest


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.float().isfinite().all())


def _not_finite(where: str, name: str) -> DamagedError:
    return DamagedError(f"{where}: {name} has values that are not finite: {DIVERGED}")


def _load(folder: Folder) -> tuple[dict[str, Tensor], str]:
    """The tensors of all files, and their hash."""
    tensors: dict[str, Tensor] = {}
    files = weight_files(folder)
    digests = []
    for file in files:
        try:
            data = folder.read_bytes(file)
        except FileNotFoundError:
            raise DamagedError(
                f"{folder.join(file)} is missing, which {INDEX_FILE} names; copy it there"
            ) from None
        try:
            tensors.update(safetensors.torch.load(data))
        # safetensors raises KeyError for a type of number that PyTorch lacks.
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedError(f"{folder.join(file)} is damaged: {one_line(error)}") from None
        digests.append(hashlib.sha256(data))
    if files != [WEIGHTS_FILE]:
        missing = _read_index(folder).keys() - tensors.keys()
        if missing:
            raise DamagedError(
                f"{folder.join(INDEX_FILE)} does not fit its files: {min(missing)!r} is in none"
            )
    return tensors, _join(digests)


def _join(digests: list[Any]) -> str:
    """One hash of the files: that of the file where there is one."""
    if len(digests) == 1:
        return str(digests[0].hexdigest())
    return hashlib.sha256(b"".join(each.digest() for each in digests)).hexdigest()


def read_weights(folder: Folder) -> Weights:
    """Read a model's weights as fp32 arrays, which many processes can share."""
    return {name: tensor.float().numpy() for name, tensor in read_tensors(folder).items()}


def weights_hash(folder: Folder) -> str:
    """SHA-256 of a model's weights; empty where there are none, which loading reports."""
    try:
        return _join([hashlib.sha256(folder.read_bytes(name)) for name in weight_files(folder)])
    except (FileNotFoundError, UserError, DamagedError):
        return ""


class Source:
    """The tensors of a model directory, and which of them belong to a parameter of a model."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        folder: Folder,
        layout: str,
        optional: tuple[str, ...] = (),
    ) -> None:
        """Take tensors by the names of transformers.

        Parameters with a prefix in `optional` keep their values where no tensor fits, those of
        `classifier.` always.
        """
        base = "model." if layout == "modern" else "bert."
        if not any(name.startswith(base) for name in tensors):  # saved from the encoder alone
            tensors = {base + name: tensor for name, tensor in tensors.items()}
        self._tensors, self._folder = tensors, folder
        self._layout, self._optional = layout, optional

    @property
    def _where(self) -> str:
        is_single = self._folder.exists(WEIGHTS_FILE)
        return self._folder.join(WEIGHTS_FILE if is_single else INDEX_FILE)

    def check(self, outline: MaskedLM | Classifier, num_layers: int) -> None:
        """Check all shapes against those of a model on the device meta, which takes no memory.

        The outline has at most two layers, and the last stands for all that follow: so the number
        of layers is compared before a model is built. DamagedError: a tensor is missing, or has
        another shape or no floats.
        """
        found = layers_in(self._tensors, self._layout)
        if found != num_layers:
            raise DamagedError(
                f"{self._where} does not fit config.json: it holds {found} layers, and "
                f"num_hidden_layers is {num_layers}"
            )
        last = len(outline.encoder.layers) - 1
        for name, target in outline.state_dict().items():
            self._find(name, target)
            mark = f"encoder.layers.{last}."
            if name.startswith(mark):
                for layer in range(last + 1, num_layers):
                    self._find(f"encoder.layers.{layer}.{name.removeprefix(mark)}", target)

    def copy_into(self, model: MaskedLM | Classifier) -> None:
        """Copy the tensors into a model, as fp32; DamagedError as in `check`, or for NaN."""
        for name, target in model.state_dict().items():
            parts = self._find(name, target)
            if not parts:
                continue
            source = torch.cat([part.float() for part in parts])
            if name == "encoder.embeddings.token_type":
                source = source[:1]  # of the first segment
            if not _is_finite(source):
                raise _not_finite(self._where, transformers_names(name, self._layout)[0])
            target.copy_(source)

    def _find(self, name: str, target: Tensor) -> list[Tensor]:
        """The tensors whose concatenation is a parameter; empty: it keeps its value."""
        if name.startswith("classifier.") and self._optional:
            return []
        names = transformers_names(name, self._layout)
        missing = [part for part in names if part not in self._tensors]
        is_optional = name.startswith(self._optional) if self._optional else False
        if missing and is_optional:
            return []
        if missing:
            raise DamagedError(f"{self._where} is damaged: {missing[0]} is missing")
        parts = [self._tensors[part] for part in names]
        rows = [*target.shape]
        rows[0] //= len(parts)
        for part_name, part in zip(names, parts, strict=True):
            shape = list(part.shape)
            if name == "encoder.embeddings.token_type" and shape[:1] > [1]:
                shape[0] = 1
            if shape != rows:
                if is_optional:
                    return []
                raise DamagedError(
                    f"{self._where} does not fit config.json: {part_name} has shape "
                    f"{list(part.shape)} in place of {rows}"
                )
            if part.dtype not in _FLOATS:
                raise DamagedError(
                    f"{self._where} is damaged: {part_name} holds {part.dtype}, and no floats"
                )
        return parts
