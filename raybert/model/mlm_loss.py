"""The vocabulary projection and its cross-entropy in one, a chunk of positions at a time.

Written plainly, M x V logits are stored in fp32 and passed over six times, which at V = 30,000
takes four times as long as the three matrix products that they are for. Here a chunk's logits
become the loss and both gradients before the next chunk is computed.

Shapes: D hidden, V vocabulary, M masked positions, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of positions that are not predicted

CHUNK_LOGITS = 1 << 23  # logits held at once: 16 MiB of bf16


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of `softmax(x weight^T + bias)` against `targets`.

    Matrix products run in autocast's dtype where it is on, else in `x`'s.

    Args:
        x: hidden states [M, D].
        weight: the embedding matrix [V, D].
        bias: [V].
        targets: int64 [M], each in 0 .. V-1.

    Returns:
        The sum in nats: a scalar, fp32, or fp64 where `x` is.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, targets, dtype
        )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        x_low, weight_low, bias_low = x.to(dtype), weight.to(dtype), bias.to(dtype)
        need_gradients = any(ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=exact, device=x.device)
        grad_x = torch.empty_like(x_low) if need_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_gradients else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if need_gradients else None
        size = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            at = targets[rows, None]  # [C, 1]
            logits = torch.addmm(bias_low, x_low[rows], weight_low.T)  # [C, V]
            logits = logits.to(exact)
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            total += (normaliser - logits.gather(1, at)).sum()
            if grad_x is None or grad_weight is None or grad_bias is None:
                continue
            slope = logits.sub_(normaliser).exp_()  # [C, V], the softmax
            slope.scatter_add_(1, at, slope.new_full(at.shape, -1.0))
            grad_bias += slope.sum(dim=0)
            slope = slope.to(dtype)
            torch.mm(slope, weight_low, out=grad_x[rows])
            grad_weight += slope.T @ x_low[rows]
        if need_gradients:
            ctx.gradients = (grad_x, grad_weight, grad_bias)
            ctx.dtypes = (x.dtype, weight.dtype, bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            (gradient * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)
