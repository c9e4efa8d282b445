"""Attention over all heads, by the fastest kernel that the device has, and its plan for a batch.

On GPUs and in fp32 the kernels are PyTorch's own. In bf16 on CPUs the backward pass of the fused
attention reaches a tenth of the speed of plain matrix products, so those are used there.

Shapes: B batch, T tokens, N heads, H head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Longest text for plain matrix products, which keep all T x T probabilities for backward.
MAX_MATMUL_TOKENS = 512
CHUNK_SCORES = 1 << 21  # scores computed at once: 4 MiB of bf16, so that they stay in the cache


class AttentionPlan(NamedTuple):
    """The inputs of attention for the global layers of a batch, or for its local ones.

    Texts that are concatenated in one row are separated by `lengths`, or in compiled layers by
    `cu_seqlens`, and need no mask.
    """

    mask: Tensor | None  # bool [B or 1, 1, T or 1, T], True: attend; None: attend to everything
    cos: Tensor | None  # fp32 [B or 1, T, 1, 1, H/2]; None: no rotary positions
    sin: Tensor | None
    lengths: Sequence[int] | None = None  # tokens of each text
    cu_seqlens: Tensor | None = None  # int64 [texts + 1]: cumulative lengths
    half_window: int | None = None  # of a local layer


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Scaled dot-product attention of queries, keys and values [B, N, T, H] -> [B, N, T, H].

    Every layer calls this; it and the functions that it calls choose the kernel.
    """
    if plan.cu_seqlens is not None:
        return attend_varlen_op(q, k, v, plan.cu_seqlens, plan.half_window)
    if plan.lengths is not None:
        return attend_varlen(q, k, v, plan.lengths, plan.half_window)
    return attend_batch(q, k, v, plan.mask)


def attend_batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for a text, or packed documents, in each row.

    `mask` is bool [B or 1, 1, T or 1, T], True: the query may attend to the key; None: each query
    attends to every key.
    """
    fused_is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if fused_is_slow and q.shape[2] <= MAX_MATMUL_TOKENS:
        return attend_with_matmuls(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], half_window: int | None = None
) -> Tensor:
    """`attend` for texts that are concatenated in one row, B = 1; each attends to itself only.

    `lengths` are the tokens of each text and sum to T; a token attends to `half_window` tokens to
    either side, or to all of its text. Nothing is computed for padding, and a text's values do not
    depend on its neighbours. Consecutive texts of equal length are computed as one batch.
    """
    _, heads, seq_len, head_dim = q.shape
    rows = [tensor[0].transpose(0, 1) for tensor in (q, k, v)]  # [T, N, H] each
    mixed = q.new_empty(seq_len, heads, head_dim)
    matmuls = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not q.requires_grad
    begin = 0
    for length, group in itertools.groupby(lengths):
        count = len(list(group))
        end = begin + count * length
        mask = None
        if half_window is not None and length > half_window + 1:
            mask = local_mask(length, half_window, q.device)
        if matmuls and length <= MAX_MATMUL_TOKENS and mask is None:
            for first in range(begin, end, length):
                text = slice(first, first + length)
                _attend_one_text(*(row[text] for row in rows), out=mixed[text])
            begin = end
            continue
        shape = (count, length, heads, head_dim)
        batch_q, batch_k, batch_v = (  # [B, N, T, H] each
            row[begin:end].reshape(shape).transpose(1, 2) for row in rows
        )
        batch = attend_batch(batch_q, batch_k, batch_v, mask)
        mixed[begin:end] = batch.transpose(1, 2).flatten(0, 1)
        begin = end
    return mixed.transpose(0, 1)[None]


def local_mask(seq_len: int, half_window: int, device: torch.device) -> Tensor:
    """Which tokens are within `half_window` of each other: bool [1, 1, T, T]."""
    positions = torch.arange(seq_len, device=device)
    return ((positions[:, None] - positions).abs() <= half_window)[None, None]


def _attend_one_text(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor) -> None:
    """Attention of one text, [T, N, H] each, in plain matrix products.

    Without gradients, too, they take half as long in bf16 as the fused kernel: 4.5 ms against 8.7
    (9 texts of 227 tokens, 4 heads of 64, one core of an AMD EPYC with AVX-512, torch 2.13).
    """
    q, k, v = (tensor.transpose(0, 1) for tensor in (q * q.shape[-1] ** -0.5, k, v))  # [N, T, H]
    probabilities = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)  # [N, T, T]
    torch.bmm(probabilities, v, out=out.transpose(0, 1))


def attend_varlen_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, half_window: int | None
) -> Tensor:
    """`attend_varlen` without gradients, as one operator for compiled models.

    The number of texts and their lengths are data to it, so batches of any shape share the same
    compiled code. `cu_seqlens`, int64 [texts + 1] on the CPU, are the cumulative lengths: where
    each text begins, and where the last one ends.
    """
    mixed: Tensor = torch.ops.raybert.attend_varlen(q, k, v, cu_seqlens, half_window)
    return mixed


def _attend_varlen_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, half_window: int | None
) -> Tensor:
    lengths = [end - begin for begin, end in itertools.pairwise(cu_seqlens.tolist())]
    return attend_varlen(q, k, v, lengths, half_window)


def _attend_varlen_meta(q: Tensor, *rest: Any) -> Tensor:
    """An empty tensor with the shape and the strides of `_attend_varlen_cpu`'s result."""
    _, heads, seq_len, head_dim = q.shape
    return q.new_empty(seq_len, heads, head_dim).transpose(0, 1)[None]


_LIBRARY: Any = torch.library.Library("raybert", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "attend_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int? half_window) -> Tensor"
)
_LIBRARY.impl("attend_varlen", _attend_varlen_cpu, "CPU")
_LIBRARY.impl("attend_varlen", _attend_varlen_meta, "Meta")


def attend_with_matmuls(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend_batch` in plain matrix products, a few texts at a time.

    Against the fused kernel, forward and backward on one core of an AMD EPYC with AVX-512, torch
    2.13: 52 ms against 127 (32 x 256 tokens, 8 heads of 16), 32 against 105 (64 x 128, 4 of 64).
    Probabilities and their gradients are rounded to the inputs' dtype, sums over them are fp32.
    """
    mixed: Tensor = _MatmulAttention.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return mixed


class _MatmulAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, seq_len, head_dim = q.shape
        ctx.shape, ctx.scale = q.shape, head_dim**-0.5
        # [B N, T, H] each; scaling q, the smallest of the factors, costs the least
        q, k, v = ((q * ctx.scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        probabilities = q.new_empty(batch * heads, seq_len, seq_len)  # [B N, T, T]
        out = torch.empty_like(v)
        for texts, rows in _chunks(ctx.shape):
            part = torch.bmm(q[rows], k[rows].transpose(1, 2), out=probabilities[rows])
            if mask is not None:
                visible = mask if mask.shape[0] == 1 else mask[texts]
                scores = part.view(-1, heads, seq_len, seq_len)
                scores.masked_fill_(~visible, torch.finfo(part.dtype).min)
            torch.softmax(part, dim=-1, out=part)
            torch.bmm(part, v[rows], out=out[rows])
        ctx.save_for_backward(q, k, v, probabilities)
        return out.view(ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        grad = grad.flatten(0, 1)  # [B N, T, H]
        grad_q, grad_k, grad_v = (torch.empty_like(tensor) for tensor in (q, k, v))
        for _, rows in _chunks(ctx.shape):
            part = probabilities[rows]
            torch.bmm(part.transpose(1, 2), grad[rows], out=grad_v[rows])
            grad_scores = torch.bmm(grad[rows], v[rows].transpose(1, 2))
            # In place, and with its sum in fp32: a rounding error of that sum would be common to
            # the whole row, and grad_q would contain it times the mean key.
            torch.ops.aten._softmax_backward_data.out(
                grad_scores, part, -1, part.dtype, grad_input=grad_scores
            )
            torch.bmm(grad_scores, k[rows], out=grad_q[rows])
            torch.bmm(grad_scores.transpose(1, 2), q[rows], out=grad_k[rows])
        grad_q *= ctx.scale
        grads = (gradient.view(ctx.shape) for gradient in (grad_q, grad_k, grad_v))
        return (*grads, None)


def _chunks(shape: torch.Size) -> list[tuple[slice, slice]]:
    """Split a batch [B, N, T, H]: slices of its texts, and the same slices of B x N heads."""
    batch, heads, seq_len, _ = shape
    size = max(1, CHUNK_SCORES // max(1, heads * seq_len**2))
    ends = [(begin, min(begin + size, batch)) for begin in range(0, batch, size)]
    return [(slice(a, b), slice(a * heads, b * heads)) for a, b in ends]


def plan_attention(
    mask: Tensor | None,
    angles: Tensor | None,
    seq_len: int,
    lengths: Sequence[int] | None,
    half_window: int | None,
) -> AttentionPlan:
    """Plan the attention of the global layers, or of the local ones (`half_window` is not None).

    `mask` is the batch's `visibility_mask`; `angles` are fp32 [T, H/2] or [B, T, H/2], None without
    rotary positions; `seq_len` is the number of tokens of the longest text.
    """
    cos = sin = None
    if angles is not None:
        angles = angles[..., None, None, :]  # broadcasts over queries and keys, and over heads
        cos, sin = angles.cos(), angles.sin()
        if lengths is None and half_window is not None and seq_len > half_window + 1:
            near = local_mask(seq_len, half_window, angles.device)
            mask = near if mask is None else mask & near
    return AttentionPlan(mask, cos, sin, lengths, half_window=half_window)


def visibility_mask(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Which tokens may attend to which: bool, broadcastable to [B, 1, T, T]; None: all to all.

    `attention_mask` is bool [B, T], False at padding; None: no padding. With `document_ids` int64
    [B, T], tokens attend to their own document only; None: a row is one document.
    """
    if document_ids is None:
        return None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if attention_mask is not None:
        # Padding becomes a document: the softmax of a token without any key would be NaN.
        document_ids = document_ids.masked_fill(~attention_mask.bool(), -1)
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]  # [B, 1, T, T]


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions that start at 0 in each document: int64 [B, T] -> int64 [B, T]."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device)
    columns = columns.expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return columns - (columns * starts).cummax(dim=1).values


def concatenated_positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Positions that start at 0 in each text of one row: int64 [1, sum of lengths]."""
    longest = torch.arange(max(lengths), device=device)
    return torch.cat([longest[:length] for length in lengths])[None]
