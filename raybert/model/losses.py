"""The vocabulary projection fused with its cross-entropy, a chunk of positions at a time.

Unfused, M x V logits are stored in fp32 and read or written six times, which at V = 30,000 takes
four times as long as the three matrix products around them. Here a chunk's logits become the loss
and both gradients before the next chunk is computed.

Shapes: D hidden, V vocabulary, M masked positions, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 1 << 26  # logits held at once: 128 MiB of bf16, and on GPUs their softmax, too
#: Columns added for the bias: matrix products need multiples of 2 (CPUs) or 8 (GPUs) for speed.
BIAS_COLUMNS = {"cpu": 2}
OTHER_BIAS_COLUMNS = 8


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of `softmax(x weight^T + bias)`, in nats, against `targets`.

    `x` are hidden states [M, D], `weight` is the embedding matrix [V, D], `bias` is [V], `targets`
    are int64 [M] in 0 .. V-1, or negative: such positions count for nothing, so that batches can
    have as many. The sum is a scalar, fp32, or fp64 where `x` is.

    Logits and their softmax have autocast's dtype where it is on, else that of `x`; sums over
    chunks, of the loss and of the gradients of `weight` and `bias`, are fp32. In bf16 the relative
    error of the sum is about 1e-4, and that of the gradients 1% of their norm, as with any bf16
    matrix product. Gradients are computed in the forward pass, and only if gradients are enabled.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, targets, dtype, torch.is_grad_enabled()
        )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        train: bool,
    ) -> Tensor:
        ctx.dtypes = (x.dtype, weight.dtype, bias.dtype)
        exact = torch.promote_types(x.dtype, torch.float32)
        on_cpu = x.device.type == "cpu"
        # The bias becomes one more column of the weight, multiplied by a constant one in x: adding
        # it to the logits, and summing their gradients for its own, would each read them once more.
        width = x.shape[1]
        padding = (0, BIAS_COLUMNS.get(x.device.type, OTHER_BIAS_COLUMNS))
        x, weight = F.pad(x.to(dtype), padding), F.pad(weight.to(dtype), padding)
        is_padding = (targets < 0)[:, None]  # [M, 1]
        targets = targets.clamp(min=0)
        x[:, width], weight[:, width] = 1, bias
        x.masked_fill_(is_padding, 0)  # its part of the gradient of `weight`
        total = torch.zeros((), dtype=exact, device=x.device)
        grad_x = torch.empty_like(x) if train else x
        grad_weight: Tensor | None = None
        chunks = max(1, -(-x.shape[0] * weight.shape[0] // CHUNK_LOGITS))
        size = max(1, -(-x.shape[0] // chunks))
        # One buffer for all chunks: first touching fresh pages costs as much as the softmax. Chunks
        # that fit into a cache are slower on CPUs: each adds to all gradients of `weight`.
        buffer = torch.empty(size, weight.shape[0], dtype=dtype, device=x.device)
        for start in range(0, x.shape[0], size):
            rows = slice(start, start + size)
            part, target = x[rows], targets[rows]  # [C, D], [C]
            logits = torch.mm(part, weight.T, out=buffer[: len(part)])  # [C, V]
            softmax = torch.softmax(logits, dim=1, out=logits if on_cpu else None)  # [C, V]
            index = torch.arange(len(part), device=x.device)
            likelihood = softmax[index, target].to(exact)  # [C]
            losses = likelihood.clamp(min=torch.finfo(exact).tiny).log()
            total -= losses.masked_fill_(is_padding[rows, 0], 0).sum()
            if train:  # the gradient of the logits is softmax - 1[target]
                # Not `scatter_`, which copies the chunk.
                softmax[index, target] = (likelihood - 1).to(dtype)
                torch.mm(softmax, weight, out=grad_x[rows])
                grad = (softmax.T @ part).to(exact)
                grad_weight = grad if grad_weight is None else grad_weight.add_(grad)
        if train:
            grad_x.masked_fill_(is_padding, 0)
            if grad_weight is None:  # M is 0
                grad_weight = torch.zeros_like(weight, dtype=exact)
            ctx.save_for_backward(
                grad_x[:, :width], grad_weight[:, :width], grad_weight[:, width].clone()
            )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            (gradient * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)
