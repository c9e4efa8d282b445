"""Attention over all heads, by the fastest kernel that the device has, and its plan for a batch.

On GPUs and in fp32 the kernels are PyTorch's own. In bf16 on CPUs the backward pass of the fused
attention reaches a tenth of the speed of plain matrix products, so those are used there.

Shapes: B batch, T tokens, N heads, H head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.model.attention_plan import (
    AttentionPlan,
    local_mask,
    window_mask,
    window_queries,
    with_neighbours,
)

#: Longest text for plain matrix products, which keep all T x T probabilities for backward.
MAX_MATMUL_TOKENS = 512
CHUNK_SCORES = 1 << 21  # scores computed at once: 4 MiB of bf16, so that they stay in the cache


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Scaled dot-product attention of queries, keys and values [B, N, T, H] -> [B, N, T, H].

    Every layer calls this; it and the functions that it calls choose the kernel.
    """
    if plan.longest is not None and plan.cu_seqlens is not None:
        return attend_flash_varlen(q, k, v, plan.cu_seqlens, plan.longest, plan.half_window)
    if plan.cu_seqlens is not None:
        return attend_varlen_op(q, k, v, plan.cu_seqlens, plan.half_window)
    if plan.lengths is not None:
        return attend_varlen(q, k, v, plan.lengths, plan.half_window)
    if plan.windows is not None and plan.half_window is not None:
        return attend_windows(q, k, v, plan.windows, plan.half_window)
    return attend_batch(q, k, v, plan.mask)


def attend_batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for a text, or packed documents, in each row.

    `mask` is bool [B or 1, 1, T or 1, T], True: the query may attend to the key; None: each query
    attends to every key. There may be another number of keys and values than of queries.
    """
    fused_is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if fused_is_slow and q.shape[2] <= MAX_MATMUL_TOKENS:
        return attend_with_matmuls(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, half_window: int) -> Tensor:
    """`attend` within a window around each token; `mask` is a `window_mask` [W, 1, Q, K].

    For a row of T tokens, T x K scores are computed in place of T x T.
    """
    batch, heads, seq_len, head_dim = q.shape
    queries = mask.shape[2]

    def blocks(x: Tensor) -> Tensor:  # [B, N, T, H] -> [W, Q, N, H]
        rows = x.transpose(1, 2).flatten(0, 1)  # [B T, N, H]
        padded = F.pad(rows, (0, 0, 0, 0, 0, -len(rows) % queries))
        return padded.view(-1, queries, heads, head_dim)

    around: Any = _WithNeighbours.apply  # [W, K, N, H] of keys and of values
    keys, values = (around(blocks(x), half_window) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (blocks(q), keys, values))  # [W, N, Q or K, H]
    rows = attend_batch(q, k, v, mask).transpose(1, 2).flatten(0, 1)  # [W Q, N, H]
    return rows[: batch * seq_len].view(batch, seq_len, heads, head_dim).transpose(1, 2)


class _WithNeighbours(torch.autograd.Function):
    """`with_neighbours` with its backward pass: autograd's own fills a tensor for each slice."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, half_window: int) -> Tensor:
        ctx.sizes = blocks.shape[1], half_window
        return with_neighbours(blocks, half_window)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        queries, half_window = ctx.sizes
        own = grad[:, half_window : half_window + queries].clone()
        own[:-1, queries - half_window :] += grad[1:, :half_window]
        own[1:, :half_window] += grad[:-1, half_window + queries :]
        return own, None


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], half_window: int | None = None
) -> Tensor:
    """`attend` for texts that are concatenated in one row, B = 1; each attends to itself only.

    `lengths` are the tokens of each text and sum to T; a token attends to `half_window` tokens to
    either side, or to all of its text. Nothing is computed for padding, and a text's values do not
    depend on its neighbours. Consecutive texts of equal length are computed as one batch.
    """
    _, heads, seq_len, head_dim = q.shape
    groups = [(length, len(list(group))) for length, group in itertools.groupby(lengths)]
    sizes = [length * count for length, count in groups]
    # Split, not sliced, and joined at the end: the backward pass of a slice has the whole size.
    rows = [torch.split(x[0].transpose(0, 1), sizes) for x in (q, k, v)]  # [T, N, H] each
    trains = q.requires_grad
    mixed = q.new_empty(0 if trains else seq_len, heads, head_dim)
    parts = torch.split(mixed, sizes) if not trains else ()
    matmuls = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not trains
    batches = []
    for index, ((length, count), *inputs) in enumerate(zip(groups, *rows, strict=True)):
        mask, windows = None, 0
        if half_window is not None and length > half_window + 1:
            windows = window_queries(length, half_window)
            mask = None if windows else local_mask(length, half_window, q.device)
        if matmuls and length <= MAX_MATMUL_TOKENS and mask is None and not windows:
            for text in zip(
                *(torch.split(x, length) for x in (*inputs, parts[index])), strict=True
            ):
                _attend_one_text(*text[:3], out=text[3])
            continue
        shape = (count, length, heads, head_dim)
        batch_q, batch_k, batch_v = (row.reshape(shape).transpose(1, 2) for row in inputs)
        if windows and half_window is not None:
            numbers = torch.arange(count, device=q.device)[:, None].expand(count, length)
            near = window_mask(numbers, half_window, windows)
            batch = attend_windows(batch_q, batch_k, batch_v, near, half_window)
        else:
            batch = attend_batch(batch_q, batch_k, batch_v, mask)  # [B, N, T, H]
        batch = batch.transpose(1, 2).flatten(0, 1)
        if trains:
            batches.append(batch)
        else:
            parts[index].copy_(batch)
    return (torch.cat(batches) if trains else mixed).transpose(0, 1)[None]


def _attend_one_text(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor) -> None:
    """Attention of one text, [T, N, H] each, in plain matrix products.

    Without gradients, too, they take half as long in bf16 as the fused kernel: 4.5 ms against 8.7
    (9 texts of 227 tokens, 4 heads of 64, one core of an AMD EPYC with AVX-512, torch 2.13).
    """
    q, k, v = (tensor.transpose(0, 1) for tensor in (q * q.shape[-1] ** -0.5, k, v))  # [N, T, H]
    probabilities = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)  # [N, T, T]
    torch.bmm(probabilities, v, out=out.transpose(0, 1))


def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention takes texts of any lengths in one row: `attend_flash_varlen`."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8:
        return False
    try:
        from torch.nn.attention import varlen  # noqa: F401 - of torch 2.10 and later
    except ImportError:
        return False
    return head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, half_window: int | None
) -> Tensor:
    """`attend_varlen` on a GPU: one kernel for all texts, which stores and masks no scores."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, seq_len, head_dim = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B T, N, H] each
    window = (-1, -1) if half_window is None else (half_window, half_window)
    ends = cu_seqlens
    mixed = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=window)
    assert isinstance(mixed, Tensor)
    return mixed.view(batch, seq_len, heads, head_dim).transpose(1, 2)


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
        batch, heads, queries, head_dim = q.shape
        keys = k.shape[2]
        ctx.shapes, ctx.scale = (q.shape, k.shape, v.shape), head_dim**-0.5
        # [B N, T, H] each; scaling q, the smallest of the factors, costs the least
        q, k, v = ((q * ctx.scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        probabilities = q.new_empty(batch * heads, queries, keys)  # [B N, T, T]
        out = torch.empty_like(q)
        for texts, rows in _chunks(batch, heads, queries * keys):
            part = torch.bmm(q[rows], k[rows].transpose(1, 2), out=probabilities[rows])
            if mask is not None:
                visible = mask if mask.shape[0] == 1 else mask[texts]
                scores = part.view(-1, heads, queries, keys)
                scores.masked_fill_(~visible, torch.finfo(part.dtype).min)
            torch.softmax(part, dim=-1, out=part)
            torch.bmm(part, v[rows], out=out[rows])
        ctx.save_for_backward(q, k, v, probabilities)
        return out.view(ctx.shapes[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        grad = grad.flatten(0, 1)  # [B N, T, H]
        grad_q, grad_k, grad_v = (torch.empty_like(tensor) for tensor in (q, k, v))
        (batch, heads, *_), _, _ = ctx.shapes
        for _, rows in _chunks(batch, heads, probabilities[0].numel()):
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
        grads = (grad_q, grad_k, grad_v)
        return *(each.view(shape) for each, shape in zip(grads, ctx.shapes, strict=True)), None


def _chunks(batch: int, heads: int, scores: int) -> list[tuple[slice, slice]]:
    """Split a batch [B, N, ...]: slices of its texts, and the same slices of B x N heads.

    `scores` are the queries of a head times its keys.
    """
    size = max(1, CHUNK_SCORES // max(1, heads * scores))
    ends = [(begin, min(begin + size, batch)) for begin in range(0, batch, size)]
    return [(slice(a, b), slice(a * heads, b * heads)) for a, b in ends]
