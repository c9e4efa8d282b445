"""`model.safetensors`: parameter names, and copying tensors to and from a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from raybert.errors import DamagedError, UserError
from raybert.model.heads import Classifier, MaskedLM
from raybert.storage.folder import Folder

WEIGHTS_FILE = "model.safetensors"

#: fp32 arrays by their names in the file.
Weights = Mapping[str, npt.NDArray[Any]]

# raybert -> transformers: replacements that are applied in turn to each name of a state dict.
_MODERN_NAMES = {
    "encoder.embeddings.tokens": "model.embeddings.tok_embeddings",
    "encoder.": "model.",
    "attention_norm": "attn_norm",
    "feed_forward_norm": "mlp_norm",
    "attention.qkv": "attn.Wqkv",
    "attention.out": "attn.Wo",
    "feed_forward.up": "mlp.Wi",
    "feed_forward.down": "mlp.Wo",
    "transform.": "head.",
}
_CLASSIC_NAMES = {
    "encoder.embeddings.tokens": "bert.embeddings.word_embeddings",
    "encoder.embeddings.positions": "bert.embeddings.position_embeddings.weight",
    "encoder.embeddings.token_type": "bert.embeddings.token_type_embeddings.weight",
    "encoder.embeddings.norm": "bert.embeddings.LayerNorm",
    "encoder.layers.": "bert.encoder.layer.",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_norm": "output.LayerNorm",
    "attention.qkv": "attention.self.{}",  # three tensors: query, key, value
    "attention.out.": "attention.output.dense.",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "transform.0": "bert.pooler.dense",
}
_MLM_BIAS = {"modern": "decoder.bias", "classic": "cls.predictions.bias"}


def serialize(model: MaskedLM | Classifier) -> bytes:
    """The content of `model.safetensors`: fp32 tensors under the names of transformers."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        names = _transformers_names(name, model.encoder.config.layout)
        for part, piece in zip(names, tensor.chunk(len(names)), strict=True):
            tensors[part] = piece.detach().cpu().float().contiguous()
    data: bytes = safetensors.torch.save(tensors, {"format": "pt"})
    return data


def read_tensors(folder: Folder) -> dict[str, Tensor]:
    """Read `model.safetensors` as fp32, under the names that transformers uses today."""

    def modern(name: str) -> str:  # BERT's first checkpoints have TensorFlow's names here
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        return name.replace("LayerNorm.beta", "LayerNorm.bias")

    return {modern(name): tensor.float() for name, tensor in _load(folder)[0].items()}


def check_weights(folder: Folder) -> str:
    """Raise for missing or damaged weights; return the `weights_hash` of the same bytes."""
    return _load(folder)[1]


def _load(folder: Folder) -> tuple[dict[str, Tensor], str]:
    """The tensors of `model.safetensors`, and the SHA-256 of the file."""
    try:
        data = folder.read_bytes(WEIGHTS_FILE)
        return safetensors.torch.load(data), hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        if folder.exists("pytorch_model.bin"):
            raise UserError(
                f"{folder} holds pytorch_model.bin, which raybert does not open: unpickling it can "
                "run any code; convert it with transformers' save_pretrained to "
                f"{WEIGHTS_FILE}"
            ) from None
        raise UserError(
            f"{folder} has no weights: {WEIGHTS_FILE} is missing; copy it there, beside config.json"
        ) from None
    except SafetensorError as error:
        raise DamagedError(f"{folder.join(WEIGHTS_FILE)} is damaged: {error}") from None


def read_weights(folder: Folder) -> Weights:
    """Read a model's weights as arrays, which many processes can share."""
    return {name: tensor.numpy() for name, tensor in read_tensors(folder).items()}


def weights_hash(folder: Folder) -> str:
    """SHA-256 of a model's weights; empty where there are none, which loading reports."""
    try:
        return hashlib.sha256(folder.read_bytes(WEIGHTS_FILE)).hexdigest()
    except FileNotFoundError:
        return ""


def copy_into(
    model: MaskedLM | Classifier,
    tensors: dict[str, Tensor],
    folder: Folder,
    optional: tuple[str, ...] = (),
) -> None:
    """Copy tensors, by the names of transformers, into a model; all must be there and fit.

    Those with a prefix in `optional` stay as they are where no tensor fits, `classifier.` always.
    """
    layout = model.encoder.config.layout
    base = "model." if layout == "modern" else "bert."
    if not any(name.startswith(base) for name in tensors):  # saved from the encoder alone
        tensors = {base + name: tensor for name, tensor in tensors.items()}
    for name, target in model.state_dict().items():
        names = _transformers_names(name, layout)
        if name.startswith("classifier.") and optional:
            continue
        missing = [part for part in names if part not in tensors]
        if missing and name.startswith(optional):
            continue
        if missing:
            raise DamagedError(f"{folder.join(WEIGHTS_FILE)} is damaged: {missing[0]} is missing")
        source = torch.cat([tensors[part] for part in names])
        if name == "encoder.embeddings.token_type":
            source = source[:1]  # of the first segment
        if source.shape != target.shape:
            if name.startswith(optional):
                continue
            raise DamagedError(
                f"{folder.join(WEIGHTS_FILE)} does not fit config.json: {names[0]} has shape "
                f"{list(source.shape)} in place of {list(target.shape)}"
            )
        target.copy_(source)


def _transformers_names(name: str, layout: str) -> list[str]:
    """Translate a name of our state dict; the classic `qkv` becomes three names."""
    if name == "bias":
        return [_MLM_BIAS[layout]]
    replacements = _MODERN_NAMES if layout == "modern" else _CLASSIC_NAMES
    for ours, theirs in replacements.items():
        name = name.replace(ours, theirs)
    return [name.format(part) for part in ("query", "key", "value")] if "{}" in name else [name]
