"""The registry of precisions that a classifier runs in, and the one selected for a machine type.

A new precision is one more entry (and one more value of the setting `serve.precision`). The encoder
changes; the classification head stays in fp32, unless transformers computes the model.
`precision_choice` selects; its choice is one file per machine type beside the weights, so that all
replicas on such machines take the same precision.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raybert.cluster.machine import cores, device_name, has_fast_bf16
from raybert.errors import DamagedError, StorageError, UserError
from raybert.inference.compiled import can_compile, compile_modules
from raybert.inference.int8 import has_int8, to_int8
from raybert.inference.onednn import has_onednn, pack, replace_modules
from raybert.model import huggingface
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.storage.exclusive import create_json
from raybert.storage.folder import Folder
from raybert.storage.registry import CHOICES

_FP32_BUFFERS = ("global_angles", "local_angles")  # bf16 represents integers up to 256 only


def build_model(model: Classifier, precision: str) -> nn.Module:
    """Make a module that is called as an fp32 classifier and computes in a precision."""
    if isinstance(model, huggingface.TransformersClassifier):
        return model.in_bf16() if precision == "bf16" else model
    return PRECISIONS[precision].build(model, next(model.parameters()).device)


def available_precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions that this machine can compute in, fp32 first."""
    return tuple(name for name, entry in PRECISIONS.items() if entry.is_available(device))


def suitable_precisions(folder: Folder) -> tuple[str, ...]:
    """The names of the precisions that the model of a directory has, on some hardware."""
    is_own = huggingface.is_own(huggingface.read_config_json(folder))
    return tuple(name for name, entry in PRECISIONS.items() if is_own or not entry.own_layers)


def default_precision(device: torch.device) -> str:
    """The precision of a model for which none was measured: bf16 where it is fast, or fp32."""
    return "bf16" if has_fast_bf16(device) else "fp32"


def _build_fp32(model: Classifier, device: torch.device) -> nn.Module:
    if device.type != "cpu" or not has_onednn():
        return model
    packed = copy.deepcopy(model)
    pack(packed.encoder)
    return packed


def _build_bf16(model: Classifier, device: torch.device) -> nn.Module:
    return _build(model, bf16=True)


def _build_int8(model: Classifier, device: torch.device) -> nn.Module:
    return _build(model, bf16=has_fast_bf16(device), int8=True, compiles=can_compile())


def _build_compiled(model: Classifier, device: torch.device) -> nn.Module:
    return _build(model, bf16=has_fast_bf16(device), compiles=True)


def _build(
    model: Classifier, *, bf16: bool, int8: bool = False, compiles: bool = False
) -> Classifier:
    """Copy a classifier and change the copy's encoder."""
    built = copy.deepcopy(model)
    encoder = built.encoder
    if bf16:
        buffers = dict(encoder.named_buffers(recurse=False))
        encoder.to(torch.bfloat16)
        for name in buffers.keys() & _FP32_BUFFERS:
            encoder.register_buffer(name, buffers[name], persistent=False)
    if int8:
        convert = functools.partial(to_int8, bf16_products=bf16)
        replace_modules(encoder, model.encoder, convert)
    if compiles:
        on_cpu = next(model.parameters()).device.type == "cpu"
        layers = (x if on_cpu else x.get_submodule("feed_forward") for x in encoder.layers)
        compile_modules(list(layers))
    built.register_module("encoder", _FP32Output(encoder))
    return built


@dataclass(frozen=True)
class Precision:
    """How a precision is built, and what it needs."""

    build: Callable[[Classifier, torch.device], nn.Module]
    is_available: Callable[[torch.device], bool] = lambda device: True
    requirement: str = ""  # for the message where it is not available
    own_layers: bool = False  # whether it is one of raybert's own encoder only


#: From the most exact one on: a later one is selected only if it is faster than those before it.
PRECISIONS = {
    "fp32": Precision(_build_fp32),
    "bf16": Precision(_build_bf16),
    "int8": Precision(
        _build_int8,
        lambda device: device.type == "cpu" and has_int8(),
        "an x86 CPU",
        own_layers=True,
    ),
    "compiled": Precision(
        _build_compiled,
        lambda device: can_compile(),
        "a C++ compiler (g++, or CXX)",
        own_layers=True,
    ),
}


class _FP32Output(nn.Module):
    """An encoder with fp32 outputs whose layers take `cu_seqlens`, a tensor, in place of lengths.

    For every list of lengths, compiled layers would be compiled again.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        positions, *plans = self.encoder.plan(input_ids, attention_mask, lengths=lengths)
        if lengths is not None and plans[0].cu_seqlens is None:
            cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
            plans = [plan._replace(lengths=None, cu_seqlens=cu_seqlens) for plan in plans]
        return self.encoder.transform(input_ids, positions, *plans).float()  # [B, T, D]


def resolve_precision(precision: str, folder: Folder, device: torch.device) -> str:
    """The precision that a setting stands for; auto: the stored choice or the default."""
    if precision == "auto":
        choice = read_choice(folder, device)
        return str(choice["precision"]) if choice else default_precision(device)
    if precision in PRECISIONS and precision not in suitable_precisions(folder):
        raise UserError(
            f"serve.precision={precision} is for raybert's own encoders, and transformers computes "
            f"{folder}; use bf16, fp32 or auto, or raybert export --format onnx --int8"
        )
    if precision not in PRECISIONS:
        raise UserError(f"serve.precision={precision}: use auto, {', '.join(PRECISIONS)}")
    if precision not in available_precisions(device):
        needs = PRECISIONS[precision].requirement
        raise UserError(f"serve.precision={precision} needs {needs}; use bf16, fp32 or auto")
    return precision


def machine_type(device: torch.device) -> str:
    """What a choice depends on: the GPU's name, or the CPU's name and its number of cores."""
    name = device_name(device)
    return name if device.type == "cuda" else f"{name}, {cores()} cores"


def read_choice(folder: Folder, device: torch.device) -> dict[str, Any] | None:
    """The choice stored for these weights and this machine type; None if there is none."""
    ending = f"-{_short_hash(machine_type(device))}.json"
    names = [n for n in folder.names() if n.startswith(CHOICES) and n.endswith(ending)]
    if not names:  # before all weights are read for their hash
        return None
    name = _file_name(folder, device)
    if name not in names:
        return None
    try:
        found = folder.read_json(name)
    except DamagedError:
        return None
    is_choice = isinstance(found, dict) and found.get("precision") in [*PRECISIONS]
    return found if is_choice else None


def store_choice(
    folder: Folder, device: torch.device, choice: dict[str, Any], *, replace: bool = False
) -> dict[str, Any] | None:
    """Store a choice unless there is one or `replace`; return the stored one, None if it failed."""
    name = _file_name(folder, device)
    content = {"machine": machine_type(device), **choice}
    try:
        if not replace:
            create_json(folder, name, content)
        if replace or read_choice(folder, device) is None:  # what is there is damaged
            folder.write_json(name, content)
    except (OSError, StorageError):
        return None
    return read_choice(folder, device)


def _file_name(folder: Folder, device: torch.device) -> str:
    weights, machine = huggingface.weights_hash(folder)[:8], _short_hash(machine_type(device))
    return f"{CHOICES}{weights}-{machine}.json"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
