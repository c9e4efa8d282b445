"""Attention over all heads, and dropout, by the fastest way that the device has.

PyTorch's own kernels are that on GPUs and in fp32. In bf16 on CPUs the fused attention's backward
pass runs at a tenth of what matrix products reach, and dropout draws one number at a time on one
core, which takes as long as a dense layer.

Shapes: B batch, T tokens, N heads, H head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_TOKENS = 512  # the products below keep T x T probabilities, which past that are much
CHUNK_SCORES = 1 << 21  # scores worked on at once: 4 MiB of bf16, so that they stay in the cache


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Mix the values of the tokens that each token may see.

    Args:
        q: [B, N, T, H].
        k: [B, N, T, H].
        v: [B, N, T, H].
        mask: bool [B or 1, 1, T or 1, T], True: may be seen; None: everything may.

    Returns:
        [B, N, T, H].
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if slow and q.shape[2] <= MOST_TOKENS:
        return attend_by_products(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], reach: int | None = None
) -> Tensor:
    """Same as `attend` for texts that stand end to end in one row: each sees itself alone.

    Nothing is computed for padding, and a text's values do not depend on its neighbours. Texts of
    one length that follow each other are worked on together.

    Args:
        q: [1, N, T, H].
        k: [1, N, T, H].
        v: [1, N, T, H].
        lengths: tokens of each text; they sum to T.
        reach: tokens to either side that each one sees; None: all of its text.

    Returns:
        [1, N, T, H].
    """
    _, heads, seq_len, head_dim = q.shape
    rows = [tensor[0].transpose(0, 1) for tensor in (q, k, v)]  # [T, N, H] each
    mixed = q.new_empty(seq_len, heads, head_dim)
    by_products = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not q.requires_grad
    begin = 0
    for length, alike in itertools.groupby(lengths):
        count = len(list(alike))
        end = begin + count * length
        if by_products and length <= MOST_TOKENS and (reach is None or length <= reach + 1):
            for first in range(begin, end, length):
                text = slice(first, first + length)
                _mix(*(row[text] for row in rows), out=mixed[text])
            begin = end
            continue
        shape = (count, length, heads, head_dim)
        of_q, of_k, of_v = (row[begin:end].reshape(shape).transpose(1, 2) for row in rows)
        mask = None
        if reach is not None and length > reach + 1:
            at = torch.arange(length, device=q.device)
            mask = ((at[:, None] - at).abs() <= reach)[None, None]  # [1, 1, length, length]
        mixed[begin:end] = attend(of_q, of_k, of_v, mask).transpose(1, 2).flatten(0, 1)
        begin = end
    return mixed.transpose(0, 1)[None]


def _mix(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor) -> None:
    """One text's attention, [T, N, H] each, in plain products.

    Without gradients, too, they take half as long in bf16 as the fused kernel: 4.5 ms against 8.7
    (9 texts of 227 tokens, 4 heads of 64, one core of an AMD EPYC with AVX-512, torch 2.13).
    """
    q, k, v = (tensor.transpose(0, 1) for tensor in (q * q.shape[-1] ** -0.5, k, v))  # [N, T, H]
    softmax = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)  # [N, T, T]
    torch.bmm(softmax, v, out=out.transpose(0, 1))


def attend_between(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, reach: int | None) -> Tensor:
    """Same as `attend_each`, without gradients, as one operator, which compiled models call.

    How many texts there are and how long they are is data to it, so that no batch's shape is ever
    compiled for.

    Args:
        q: [1, N, T, H].
        k: [1, N, T, H].
        v: [1, N, T, H].
        bounds: int64 [texts + 1], on the CPU: where texts begin, and where the last one ends.
        reach: as in `attend_each`.

    Returns:
        [1, N, T, H].
    """
    mixed: Tensor = torch.ops.raybert.attend_between(q, k, v, bounds, reach)
    return mixed


def _attend_between(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, reach: int | None) -> Tensor:
    at = bounds.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(at)]
    return attend_each(q, k, v, lengths, reach)


def _like_mixed(q: Tensor, *rest: Any) -> Tensor:
    """What `_attend_between` returns, laid out as it lies in memory."""
    _, heads, seq_len, head_dim = q.shape
    return q.new_empty(seq_len, heads, head_dim).transpose(0, 1)[None]


_LIBRARY: Any = torch.library.Library("raybert", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("attend_between(Tensor q, Tensor k, Tensor v, Tensor bounds, int? reach) -> Tensor")
_LIBRARY.impl("attend_between", _attend_between, "CPU")
_LIBRARY.impl("attend_between", _like_mixed, "Meta")


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Same as `attend`, in plain matrix products over some texts at a time.

    Against the fused kernel, forward and backward on one core of an AMD EPYC with AVX-512, torch
    2.13: 52 ms against 127 (32 x 256 tokens, 8 heads of 16), 32 against 105 (64 x 128, 4 of 64).
    Probabilities and their slopes are rounded to the inputs' dtype, sums over them are fp32.
    """
    mixed: Tensor = _Products.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return mixed


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, seq_len, head_dim = q.shape
        ctx.shape, ctx.scale = q.shape, head_dim**-0.5
        # [B N, T, H] each; the scale goes into q, the smallest of what it could go into
        q, k, v = ((q * ctx.scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        softmax = q.new_empty(batch * heads, seq_len, seq_len)  # [B N, T, T]
        out = torch.empty_like(v)
        for texts, at in _chunks(ctx.shape):
            part = torch.bmm(q[at], k[at].transpose(1, 2), out=softmax[at])
            if mask is not None:
                seen = mask if mask.shape[0] == 1 else mask[texts]
                scores = part.view(-1, heads, seq_len, seq_len)
                scores.masked_fill_(~seen, torch.finfo(part.dtype).min)
            torch.softmax(part, dim=-1, out=part)
            torch.bmm(part, v[at], out=out[at])
        ctx.save_for_backward(q, k, v, softmax)
        return out.view(ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, softmax = ctx.saved_tensors
        grad = grad.flatten(0, 1)  # [B N, T, H]
        grad_q, grad_k, grad_v = (torch.empty_like(tensor) for tensor in (q, k, v))
        for _, at in _chunks(ctx.shape):
            part = softmax[at]
            torch.bmm(part.transpose(1, 2), grad[at], out=grad_v[at])
            slope = torch.bmm(grad[at], v[at].transpose(1, 2))
            # In place, and with its sum in fp32: rounded, that sum would be an error common to a
            # row, which grad_q takes times the mean key.
            torch.ops.aten._softmax_backward_data.out(slope, part, -1, part.dtype, grad_input=slope)
            torch.bmm(slope, k[at], out=grad_q[at])
            torch.bmm(slope.transpose(1, 2), q[at], out=grad_k[at])
        grad_q *= ctx.scale
        grads = (gradient.view(ctx.shape) for gradient in (grad_q, grad_k, grad_v))
        return (*grads, None)


def _chunks(shape: torch.Size) -> list[tuple[slice, slice]]:
    """Cut a batch: slices of its texts, and the same of its texts' heads."""
    batch, heads, seq_len, _ = shape
    size = max(1, CHUNK_SCORES // max(1, heads * seq_len**2))
    ends = [(begin, min(begin + size, batch)) for begin in range(0, batch, size)]
    return [(slice(a, b), slice(a * heads, b * heads)) for a, b in ends]


class Dropout(nn.Module):
    """`nn.Dropout`, and on CPUs four times as fast: four draws from every 64 random bits.

    There `p` is rounded to 1/65,536. A compiled model has PyTorch's.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        """Show `p` where the model is printed."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share `p` of `x` while training, and scale the rest up for it."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # which can't trace random_
            return F.dropout(x, self.p)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        bits.random_(-(2**63), None)  # without bounds the sign's bit would never be set
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))
