"""What attention needs besides the hidden states: masks, rotary positions, text boundaries.

Computed once a batch and shared by all layers of a kind (global or local).

Shapes: B batch, T tokens, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raybert.model.attention import local_mask


class AttentionPlan(NamedTuple):
    """The inputs of attention for the global layers of a batch, or for its local ones.

    Where texts are concatenated in one row, `lengths` or `cu_seqlens` separates them and no mask is
    needed; compiled layers take `cu_seqlens`.
    """

    mask: Tensor | None  # bool [B or 1, 1, T or 1, T], True: attend; None: attend to everything
    cos: Tensor | None  # fp32 [B or 1, T, 1, 1, H/2]; None: no rotary positions
    sin: Tensor | None
    lengths: Sequence[int] | None = None  # tokens of each text
    cu_seqlens: Tensor | None = None  # int64 [texts + 1]: cumulative lengths
    half_window: int | None = None  # of a local layer, where texts are concatenated


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
    if lengths is None:
        return AttentionPlan(mask, cos, sin)
    return AttentionPlan(mask, cos, sin, lengths, half_window=half_window)


def visibility_mask(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Which tokens may attend to which: bool, broadcastable to [B, 1, T, T]; None: all to all.

    Args:
        attention_mask: bool [B, T], False at padding; None: no padding.
        document_ids: int64 [B, T]; tokens attend to their own document only; None: a row is one.
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
