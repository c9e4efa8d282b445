"""The precision selected for a model on a machine type, stored beside the model's weights.

One file for each machine type, written once, so that all replicas on such machines take the same
precision. `precision_choice` measures and selects.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from raybert.cluster.machine import cores, device_name
from raybert.errors import StorageError, UserError
from raybert.inference.precision import PRECISIONS, available_precisions, default_precision
from raybert.model import huggingface
from raybert.storage.exclusive import create_json
from raybert.storage.folder import Folder
from raybert.storage.registry import CHOICES


def resolve_precision(precision: str, folder: Folder, device: torch.device) -> str:
    """The precision that a setting stands for; auto is the stored choice or the device's default.

    Raises:
        UserError: there is no such precision, or this machine can't compute in it.
    """
    if precision == "auto":
        choice = read_choice(folder, device)
        return str(choice["precision"]) if choice else default_precision(device)
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
    found = folder.read_json(name)
    return found if isinstance(found, dict) and found.get("precision") in PRECISIONS else None


def store_choice(
    folder: Folder, device: torch.device, choice: dict[str, Any], *, replace: bool = False
) -> dict[str, Any] | None:
    """Store a choice measured on a device, or, unless `replace`, keep what is stored.

    Returns:
        The choice that is stored now; None if the folder can't be written.
    """
    name = _file_name(folder, device)
    content = {"machine": machine_type(device), **choice}
    try:
        if replace:
            folder.write_json(name, content)
        else:
            create_json(folder, name, content)
    except (OSError, StorageError):
        return None
    return read_choice(folder, device)


def _file_name(folder: Folder, device: torch.device) -> str:
    weights, machine = huggingface.weights_hash(folder)[:8], _short_hash(machine_type(device))
    return f"{CHOICES}{weights}-{machine}.json"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
