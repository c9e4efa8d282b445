"""What computes a classifier's scores in a precision: `engine` makes it of the fp32 model.

What bounds a small encoder on CPUs is not its products alone: between two of them, every element is
read and written several times. So on CPUs whole layers are compiled, for any number of texts of any
lengths, and what lies between two products becomes one loop. In int8, which does products in half
the time of bf16, that loop also scales what goes in by the largest of each token, so that no
token's values depend on another's (LLM.int8(), arXiv 2208.07339, section 2.1).

Shapes: B batch, T tokens, D hidden, I intermediate.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.cluster.machine import cpu_flags, has_fast_bf16
from raybert.inference.packed import can_pack, pack, replace_parts
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.layers import FeedForward

_ANGLES = ("global_angles", "local_angles")
_GELU_LEAST = 0.17  # gelu(x) >= -0.16998
_TINY = 1e-8  # scales are not 0
#: Of one function, in a process: once for each architecture and each number of threads. PyTorch's
#: limit is 8, past which it computes without a compiler.
_MOST_COMPILED = 128
#: How compiled loops are called from Python, in PyTorch 2.13, and so that others may run meanwhile.
_HOLDING = "kernel({}); Py_RETURN_NONE;"
_RELEASING = (
    "[](auto... given) {{ Py_BEGIN_ALLOW_THREADS kernel(given...); Py_END_ALLOW_THREADS }}({}); "
    "Py_RETURN_NONE;"
)
_LOG = logging.getLogger("ray.serve")  # a replica's; elsewhere its warnings go to standard error


def can_compile() -> bool:
    """Whether there is a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def has_int8() -> bool:
    """Whether this CPU and this PyTorch multiply bytes; others do, one number at a time."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.onednn, "qlinear_prepack")
    )


def engine(model: Classifier, precision: str) -> nn.Module:
    """Make of an fp32 classifier what computes in a precision, called alike; the head stays fp32.

    Args:
        model: the classifier, which is left as it is.
        precision: one of `precision.PRECISIONS`.
    """
    device = next(model.parameters()).device
    if precision == "fp32" and not (device.type == "cpu" and can_pack()):
        return model
    served = copy.deepcopy(model)
    encoder: Encoder = served.encoder
    if precision == "fp32":
        pack(encoder)
        return served
    fast_bf16 = has_fast_bf16(device)
    layers = encoder.layers
    if precision == "bf16" or fast_bf16:
        _to_bf16(encoder)
    if precision == "int8":
        replace_parts(encoder, model.encoder, functools.partial(_in_int8, half=fast_bf16))
    if precision == "compiled" or (precision == "int8" and can_compile()):
        on_cpu = device.type == "cpu"
        _compile([layer if on_cpu else layer.get_submodule("feed_forward") for layer in layers])
    served.register_module("encoder", _Served(encoder))
    return served


def _compile(parts: Sequence[nn.Module]) -> None:
    """Compile modules when they are first called; where that fails, all run as they are.

    Modules that differ in their weights alone share their code, however many there are.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it keeps processes
    _release_the_lock()
    # One code for any number of threads: for another one it is only traced again, which takes 2.8 s
    # in place of 10 (int8, 4 layers of 128). On one core it is as fast, within 0.3%.
    options: dict[str, Any] = {"cpp.dynamic_threads": True}
    fails = False

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        quick: Callable[..., Tensor] | None = None

        def run(*args: Any) -> Tensor:
            nonlocal quick, fails
            if fails:
                return function(*args)
            config.recompile_limit = _MOST_COMPILED  # of this thread: each has a configuration
            try:
                if quick is None:
                    quick = torch.compile(function, dynamic=True, options=options)
                return quick(*args)
            except (TorchDynamoException, OSError) as error:  # OSError: where it keeps its files
                fails = True
                told = " ".join(str(error).split("\n")[:2]).strip()  # who, and why
                _LOG.warning("compiling fails, so the model runs as it is, slower: %s", told)
                return function(*args)

        return run

    for part in parts:
        part.forward = compiled(part.forward)


def _release_the_lock() -> None:
    """Let compiled loops run without Python's lock, as PyTorch's own operators do.

    With it, two threads that compute, and the one that reads requests, wait for each other's loops:
    of two cores 1.5 were busy. PyTorch has no setting for it; another version is left as it is.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings

    if Bindings.call_entry_function == _HOLDING:
        Bindings.call_entry_function = _RELEASING


class _Served(nn.Module):
    """An encoder, called alike, to whose layers the lengths of texts are data; returns fp32."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        positions, far, near = self.encoder.plan(input_ids, attention_mask, lengths=lengths)
        if lengths is not None:
            cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
            far = far._replace(lengths=None, cu_seqlens=cu_seqlens)
            near = near._replace(lengths=None, cu_seqlens=cu_seqlens)
        return self.encoder.transform(input_ids, positions, far, near).float()  # [B, T, D]


def _to_bf16(encoder: Encoder) -> None:
    """Weights and states become bf16."""
    angles = {name: b for name, b in encoder.named_buffers(recurse=False) if name in _ANGLES}
    encoder.to(torch.bfloat16)
    for name, angle in angles.items():  # of rotary positions: bf16 counts to 256
        encoder.register_buffer(name, angle, persistent=False)


# int8 --------------------------------------------------------------------------------------------


class _Int8Linear(nn.Module):
    """A dense layer with int8 weights, scaled by output, and inputs that are scaled by token.

    What it returns has the dtype of its inputs; `half`: products are rounded to bf16.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, dense: nn.Linear, *, half: bool) -> None:
        super().__init__()
        self._half = half
        weight = dense.weight.detach().float()  # [out, in]
        scales = weight.abs().amax(dim=1).clamp(min=_TINY) / 127  # [out]
        rounded = (weight / scales[:, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        self.register_buffer("zeros", zeros, persistent=False)
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().float())
        # Without VNNI, sums of two products overflow 16 bits unless inputs have 7.
        self._most = 127 if any("vnni" in flag for flag in cpu_flags()) else 63

    def forward(self, x: Tensor, most: Tensor | None = None) -> Tensor:
        """Transform `x` [B, T, in]; `most` [B, T, 1] bounds its absolute values, if known."""
        dtype, x = x.dtype, x.float()
        if most is None:
            most = x.abs().amax(dim=-1, keepdim=True)  # [B, T, 1]
        scale = most.clamp(min=_TINY) / self._most
        # Bytes without a sign, 0 at 128: those with one are multiplied one at a time.
        rounded = (x * (1 / scale) + 128.5).to(torch.uint8)
        y: Tensor = torch.ops.raybert.multiply_bytes(
            rounded, self.packed, self.scales, self.zeros, self._half
        )
        y = y.float() * scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(dtype)


class _Int8FeedForward(nn.Module):
    """As `FeedForward`, but `down` need not look for its largest inputs: GELU is computed once."""

    def __init__(self, exact: FeedForward, *, half: bool) -> None:
        super().__init__()
        self.gated = exact.gated
        self.up = _Int8Linear(exact.up, half=half)
        self.down = _Int8Linear(exact.down, half=half)

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, self.up(x)
        gate: Tensor | None = None
        if self.gated:
            x, gate = x.chunk(2, dim=-1)  # [B, T, I] each
        x = x.float()
        # |gelu(x)| is at most |x|, and at most the larger one of x and 0.17; twice too much is 1
        # bit of 8, and only where x is near 0.
        most = torch.minimum(x.abs(), x.clamp(min=_GELU_LEAST))
        y = F.gelu(x)
        if gate is not None:
            gate = gate.float()
            most, y = most * gate.abs(), y * gate
        x = self.down(y, most.amax(dim=-1, keepdim=True)).to(dtype)
        return x


def _multiply_bytes(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, half: bool) -> Tensor:
    """Multiply `x` - 128, uint8 [..., in], by int8 weights: bf16 (`half`) or fp32 [..., out]."""
    dtype = torch.bfloat16 if half else torch.float32
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return y


def _room_for_product(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, half: bool
) -> Tensor:
    dtype = torch.bfloat16 if half else torch.float32
    return x.new_empty(*x.shape[:-1], scales.shape[0], dtype=dtype)


# An operator of our own, because the compiler takes PyTorch's with constant weights only, and would
# compile each layer by itself.
_LIBRARY: Any = torch.library.Library("raybert", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "multiply_bytes(Tensor x, Tensor packed, Tensor scales, Tensor zeros, bool half) -> Tensor"
)
for _key in ("CPU", "MkldnnCPU"):  # what weights are packed in
    _LIBRARY.impl("multiply_bytes", _multiply_bytes, _key)
_LIBRARY.impl("multiply_bytes", _room_for_product, "Meta")


def _in_int8(part: nn.Module, *, half: bool) -> nn.Module | None:
    """What takes the place of a part; None: its own parts are looked at."""
    if isinstance(part, FeedForward):
        return _Int8FeedForward(part, half=half)
    return _Int8Linear(part, half=half) if isinstance(part, nn.Linear) else None
