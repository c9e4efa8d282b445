"""What a classifier computes in: fp32, bf16, int8 or compiled; and the choice, kept with the model.

The choice lies beside the weights, in a file of its own for each machine type: replicas that read
it never differ from each other. `choice` makes it by measuring.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raybert.errors import StorageError, UserError
from raybert.model import hub
from raybert.model.heads import Classifier
from raybert.ray_session import cores
from raybert.registry import CHOICES
from raybert.storage import Folder
from raybert.train.group import Group, has_fast_bf16
from raybert.train.run import describe_machine

PRECISIONS = ("fp32", "bf16", "int8", "compiled")
#: Where a text's scores would depend on what stands beside it: int8 scales activations by the
#: largest one of a whole product's input.
ONE_BY_ONE = frozenset({"int8"})

_INT8_ENGINES = ("x86", "fbgemm", "onednn")  # those that scale weights by output
_AGREE_SECONDS = 3.0  # more than a store takes to look a file up and to write another one
_ANGLES = ("global_angles", "local_angles")


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
        "int8": device.type == "cpu"
        and hasattr(torch, "quantize_per_channel")
        and torch.backends.quantized.engine in _INT8_ENGINES,
        "compiled": shutil.which(os.environ.get("CXX", "g++")) is not None,
    }
    return tuple(name for name in PRECISIONS if has.get(name, True))


def engine(model: Classifier, precision: str) -> nn.Module:
    """Make of an fp32 classifier what computes in a precision, called alike; the head stays fp32.

    Args:
        model: the classifier, which is left as it is.
        precision: one of PRECISIONS.
    """
    if precision == "fp32":
        return model
    served = copy.deepcopy(model)
    fast_bf16 = has_fast_bf16(next(model.parameters()).device)
    if precision == "int8":
        _quantize(served.encoder)
    elif precision == "compiled":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it keeps processes
        for layer in served.encoder.layers:
            compiled: Any = torch.compile(layer.get_submodule("feed_forward"), dynamic=True)
            layer.register_module("feed_forward", compiled)
    if precision == "bf16" or (precision == "compiled" and fast_bf16):
        served.register_module("encoder", _InBf16(served.encoder))
    return served


class _InBf16(nn.Module):
    """An encoder whose weights and states are bf16; what it returns is fp32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        angles = {name: b for name, b in encoder.named_buffers(recurse=False) if name in _ANGLES}
        self.encoder = encoder.to(torch.bfloat16)
        for name, angle in angles.items():  # of rotary positions: bf16 counts to 256
            encoder.register_buffer(name, angle, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = self.encoder(*args, **kwargs)
        return x.float()


class _Int8Linear(nn.Module):
    """A dense layer with int8 weights, scaled by output, and activations quantized as they come."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        weight = dense.weight.detach().float()  # [out, in]
        scales = weight.abs().amax(dim=1).clamp(min=1e-8).double() / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        bias = None if dense.bias is None else dense.bias.detach().float()
        with warnings.catch_warnings():
            # PyTorch means to drop such tensors one day; `available` then leaves int8 out.
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized, bias)
        # Without VNNI, sums of two products overflow 16 bits unless activations have 7.
        self._reduced = not _has_vnni()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed, self._reduced)
        return y


def _quantize(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            module.register_module(name, _Int8Linear(child))
        else:
            _quantize(child)


def _has_vnni() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return any("vnni" in line for line in file if line.startswith("flags"))
    except OSError:  # not Linux
        return False


# The choice --------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    """The machine type that a choice holds for."""
    name = describe_machine(Group(device=device), threads=cores())["device"]
    return str(name) if device.type == "cuda" else f"{name}, {cores()} cores"


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
    return f"{CHOICES}{hub.weights_hash(folder)[:8]}-{_short(machine(device))}.json"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
