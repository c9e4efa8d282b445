"""Int8 linear layers for x86 CPUs: weights scaled by output, activations by token.

Each token's activations are quantized by their own maximum, so that the result does not depend on
the other tokens of a batch (LLM.int8(), arXiv 2208.07339, section 2.1). The compiler fuses the
scaling into the loop between two products; products take half the time of bf16's.

Shapes: B batch, T tokens, D hidden, I intermediate.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.cluster.machine import cpu_flags
from raybert.model.layers import FeedForward

_GELU_MINIMUM = 0.17  # gelu(x) >= -0.16998
_EPSILON = 1e-8  # keeps scales above 0


def has_int8() -> bool:
    """Whether this CPU and this PyTorch have fast int8 products; elsewhere they are emulated."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.onednn, "qlinear_prepack")
    )


def to_int8(module: nn.Module, *, bf16_products: bool) -> nn.Module | None:
    """The int8 version of a linear or feed-forward module; None for any other module."""
    if isinstance(module, FeedForward):
        return Int8FeedForward(module, bf16_products=bf16_products)
    if isinstance(module, nn.Linear):
        return Int8Linear(module, bf16_products=bf16_products)
    return None


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; its output has the dtype of its input.

    With `bf16_products`, products are rounded to bf16 before they are scaled.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, source: nn.Linear, *, bf16_products: bool) -> None:
        super().__init__()
        self._bf16_products = bf16_products
        weight = source.weight.detach().float()  # [out, in]
        scales = weight.abs().amax(dim=1).clamp(min=_EPSILON) / 127  # [out]
        rounded = (weight / scales[:, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        self.register_buffer("zeros", zeros, persistent=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach().float())
        # Without VNNI the sum of two products overflows 16 bits unless activations have 7 bits.
        self._max_level = 127 if any("vnni" in flag for flag in cpu_flags()) else 63

    def forward(self, x: Tensor, bound: Tensor | None = None) -> Tensor:
        """Map `x` [B, T, in], float, to [B, T, out].

        `bound` [B, T, 1] is an upper bound of each token's absolute values; None: computed.
        """
        dtype, x = x.dtype, x.float()
        if bound is None:
            bound = x.abs().amax(dim=-1, keepdim=True)  # [B, T, 1]
        scale = bound.clamp(min=_EPSILON) / self._max_level
        # Unsigned, with 0 at 128: oneDNN has no fast product of signed activations.
        quantized = (x * (1 / scale) + 128.5).to(torch.uint8)
        y: Tensor = torch.ops.raybert.int8_linear(
            quantized, self.packed, self.scales, self.zeros, self._bf16_products
        )
        y = y.float() * scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(dtype)


class Int8FeedForward(nn.Module):
    """`FeedForward` in int8, with a bound of GELU's output that needs no pass over it."""

    def __init__(self, source: FeedForward, *, bf16_products: bool) -> None:
        super().__init__()
        self.gated = source.gated
        self.up = Int8Linear(source.up, bf16_products=bf16_products)
        self.down = Int8Linear(source.down, bf16_products=bf16_products)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of `x` [B, T, D]."""
        dtype, x = x.dtype, self.up(x)
        gate: Tensor | None = None
        if self.gated:
            x, gate = x.chunk(2, dim=-1)  # [B, T, I] each
        x = x.float()
        # |gelu(x)| <= min(|x|, max(x, 0.17)): at most twice the true value, and only near x = 0,
        # where that costs 1 bit of 8.
        bound = torch.minimum(x.abs(), x.clamp(min=_GELU_MINIMUM))
        y = F.gelu(x)
        if gate is not None:
            gate = gate.float()
            bound, y = bound * gate.abs(), y * gate
        x = self.down(y, bound.amax(dim=-1, keepdim=True)).to(dtype)
        return x


def _int8_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bf16_products: bool
) -> Tensor:
    """Multiply `x` - 128, uint8 [..., in], by int8 weights: bf16 or fp32 [..., out]."""
    dtype = torch.bfloat16 if bf16_products else torch.float32
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return y


def _int8_linear_meta(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bf16_products: bool
) -> Tensor:
    dtype = torch.bfloat16 if bf16_products else torch.float32
    return x.new_empty(*x.shape[:-1], scales.shape[0], dtype=dtype)


# The compiler accepts PyTorch's operator with constant weights only, and would then compile every
# layer separately.
_LIBRARY: Any = torch.library.Library("raybert", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor zeros, bool bf16_products)"
    " -> Tensor"
)
for _key in ("CPU", "MkldnnCPU"):  # packed weights have the second key
    _LIBRARY.impl("int8_linear", _int8_linear, _key)
_LIBRARY.impl("int8_linear", _int8_linear_meta, "Meta")
