"""What a classifier computes in: fp32, bf16, int8 or compiled; and the choice, kept with the model.

The choice lies beside the weights, in a file of its own for each machine type: replicas that read
it never differ from each other. `choice` makes it by measuring.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from raybert.cluster.machine import cores, device_name, has_fast_bf16
from raybert.errors import StorageError, UserError
from raybert.inference.engines import can_compile, has_int8
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.storage.registry import CHOICES

PRECISIONS = ("fp32", "bf16", "int8", "compiled")

_AGREE_SECONDS = 3.0  # more than a store takes to look a file up and to write another one


def resolve(precision: str, folder: Folder, device: torch.device) -> str:
    """The precision that is meant by a setting.

    Args:
        precision: one of PRECISIONS; auto: the stored choice, or bf16 where it is fast, or fp32.
        folder: the model.
        device: where it will run.

    Raises:
        UserError: no such precision, or none that this machine has.
    """
    if precision == "auto":
        chosen = stored(folder, device)
        return str(chosen["precision"]) if chosen else fallback(device)
    if precision not in PRECISIONS:
        raise UserError(f"serve.precision={precision}: use auto, {', '.join(PRECISIONS)}")
    if precision not in available(device):
        needs = "an x86 CPU" if precision == "int8" else "a C++ compiler (g++, or CXX)"
        raise UserError(f"serve.precision={precision} needs {needs}; use bf16, fp32 or auto")
    return precision


def fallback(device: torch.device) -> str:
    """What is taken where nothing was measured."""
    return "bf16" if has_fast_bf16(device) else "fp32"


def available(device: torch.device) -> tuple[str, ...]:
    """The precisions that this machine can compute in, fp32 first."""
    has = {
        "int8": device.type == "cpu" and has_int8(),
        "compiled": can_compile(),
    }
    return tuple(name for name in PRECISIONS if has.get(name, True))


# The choice --------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    """The machine type that a choice holds for."""
    name = device_name(device)
    return name if device.type == "cuda" else f"{name}, {cores()} cores"


def stored(folder: Folder, device: torch.device) -> dict[str, Any] | None:
    """The choice that was stored for these weights and this machine type; None: none was."""
    ending = f"-{_short(machine(device))}.json"
    names = [n for n in folder.names() if n.startswith(CHOICES) and n.endswith(ending)]
    if not names:  # weights are not read for nothing
        return None
    name = _name(folder, device)
    if name not in names:
        return None
    found = folder.read_json(name)
    return found if isinstance(found, dict) and found.get("precision") in PRECISIONS else None


def store(
    folder: Folder, device: torch.device, choice: dict[str, Any], *, replace: bool = False
) -> dict[str, Any] | None:
    """Keep a choice with the model, unless somebody else was faster.

    Args:
        folder: the model.
        device: what it was made on.
        choice: has `precision`; plain JSON.
        replace: overwrite what is there.

    Returns:
        The choice that stands now; None where the folder can't be written.
    """
    name = _name(folder, device)
    whole = {"machine": machine(device), **choice}
    try:
        if replace:
            folder.write_json(name, whole)
        elif folder.is_local:
            _create(Path(folder.join(name)), json.dumps(whole, indent=2) + "\n")
        else:
            _agree(folder, name, whole)
    except (OSError, StorageError):
        return None
    return stored(folder, device)


def _agree(folder: Folder, name: str, value: dict[str, Any]) -> None:
    """Write a file on an object store, which has no locks, but one that others write at once, too.

    Each lays a proposal beside it and waits: whoever came before its proposal could be seen lays
    one, too, in that time. Then all of them see the same ones, and write the same one down.
    """
    if folder.exists(name):
        return
    proposals = f".{name}."
    mine = proposals + uuid.uuid4().hex[:8]
    folder.write_json(mine, value)
    time.sleep(_AGREE_SECONDS)
    names = folder.names(hidden=True)
    # A proposal is taken away only by who has written the file: who does not see it sees the file.
    if name not in names:
        first = min(other for other in names if other.startswith(proposals))
        with suppress(FileNotFoundError):  # it has just been taken away
            folder.write_json(name, folder.read_json(first))
    folder.delete(mine)


def _create(path: Path, text: str) -> None:
    """Write a file that appears whole, and only where there is none."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.link(beside, path)
    except FileExistsError:
        pass
    finally:
        beside.unlink(missing_ok=True)


def _name(folder: Folder, device: torch.device) -> str:
    return f"{CHOICES}{huggingface.weights_hash(folder)[:8]}-{_short(machine(device))}.json"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
