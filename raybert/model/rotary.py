"""Rotary position embeddings (arXiv 2104.09864).

Shapes: B batch, T tokens, N heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raybert.model.settings import ModelConfig


def rotary_angles(config: ModelConfig, theta: float) -> Tensor:
    """Position times frequency, fp32 [max_seq_len, H/2] (arXiv 2104.09864, equation 15)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # [H/2]
    return torch.outer(torch.arange(config.max_seq_len).float(), 1.0 / theta**exponents)


def apply_rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the queries and keys in [B, T, 3, N, H]; the values stay as they are.

    `cos` and `sin` [B or 1, T, 1, 1, H/2] are rounded to the dtype of `qkv`, as in transformers:
    mixed dtypes would cost as much again.
    """
    rotate = _Rotary.apply if qkv.requires_grad else _rotate
    rotated: Tensor = rotate(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype))
    return rotated


class _Rotary(torch.autograd.Function):
    """`_rotate` with its backward pass: autograd's own takes twice as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(qkv, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # the inverse of a rotation


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of the queries and keys in [B, T, 3, N, H]."""
    if torch.compiler.is_compiling():  # the compiler turns writes in place into masks per element
        first, second = qkv[:, :, :2].chunk(2, dim=-1)  # [B, T, 2, N, H/2] each
        halves = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([torch.cat(halves, dim=-1), qkv[:, :, 2:]], dim=2)
    qkv = qkv.clone()
    first, second = qkv[:, :, :2].chunk(2, dim=-1)  # [B, T, 2, N, H/2] each
    rotated_first = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated_first)
    return qkv
