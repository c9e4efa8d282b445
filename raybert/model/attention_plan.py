"""What attention needs to know of a batch: which tokens attend to which, and their rotary angles.

Shapes: B batch, T tokens, H head dim. Local attention of long rows is computed in W windows of Q
queries and their K keys (`window_mask`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_QUERIES = 128  # queries of a window, unless half a window of tokens is longer


class AttentionPlan(NamedTuple):
    """The inputs of attention for the global layers of a batch, or for its local ones.

    Texts that are concatenated in one row are separated by `lengths`, or in compiled layers and on
    GPUs by `cu_seqlens`, and need no mask.
    """

    mask: Tensor | None  # bool [B or 1, 1, T or 1, T], True: attend; None: attend to everything
    cos: Tensor | None  # fp32 [B or 1, T, 1, 1, H/2]; None: no rotary positions
    sin: Tensor | None
    lengths: Sequence[int] | None = None  # tokens of each text
    cu_seqlens: Tensor | None = None  # int64, int32 with `longest`, [texts + 1]: cumulative lengths
    half_window: int | None = None  # of a local layer
    windows: Tensor | None = None  # bool [W, 1, Q, K], the `window_mask` of long rows
    longest: int | None = None  # no text has more tokens; set where a kernel takes `cu_seqlens`


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


def rotation(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, T, 1, 1, H/2] of rotary angles, fp32 [T, H/2] or [B, T, H/2]."""
    angles = angles[..., None, None, :]  # broadcasts over queries and keys, and over heads
    return angles.cos(), angles.sin()


def cumulative_lengths(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where texts of these lengths begin in their row, and where the last ends: int32 [N].

    Texts of no tokens follow, so that N is a power of two and 64 at least: then batches of as many
    rows have one shape, or two.
    """
    size = max(64, 1 << len(lengths).bit_length())
    ends = list(itertools.accumulate(lengths, initial=0))
    ends += ends[-1:] * (size - len(ends))
    return torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)


def local_mask(seq_len: int, half_window: int, device: torch.device) -> Tensor:
    """Which tokens are within `half_window` of each other: bool [1, 1, T, T]."""
    positions = torch.arange(seq_len, device=device)
    return ((positions[:, None] - positions).abs() <= half_window)[None, None]


def window_queries(seq_len: int, half_window: int) -> int:
    """Q of rows for which attention in windows takes half of all their scores at most; else 0."""
    queries = max(WINDOW_QUERIES, half_window)
    return queries if seq_len >= 2 * (queries + 2 * half_window) else 0


def window_mask(texts: Tensor, half_window: int, queries: int) -> Tensor:
    """Which keys each query of a window may attend to: bool [W, 1, Q, K].

    `texts` [B, T] tells the texts of all rows apart. The rows are one after the other, padded to a
    multiple of Q; a window's keys are its queries with `half_window` tokens before and after them.
    """
    own = F.pad(texts.flatten(), (0, -texts.numel() % queries), value=-2).view(-1, queries)
    around = with_neighbours(own, half_window, fill=-3)  # [W, K]
    query = torch.arange(queries, device=texts.device)[:, None]
    key = torch.arange(-half_window, queries + half_window, device=texts.device)
    is_near = (query - key).abs() <= half_window  # [Q, K]
    return ((own[:, :, None] == around[:, None, :]) & is_near)[:, None]


def with_neighbours(blocks: Tensor, half_window: int, fill: float = 0) -> Tensor:
    """Add to each block the `half_window` tokens before and after it: [W, Q, ...] -> [W, K, ...].

    `fill` is what is before the first and after the last block. Q must be `half_window` at least.
    """
    windows, queries, *rest = blocks.shape
    around = blocks.new_empty(windows, queries + 2 * half_window, *rest)
    before, own = slice(0, half_window), slice(half_window, half_window + queries)
    after = slice(half_window + queries, None)
    around[:, own] = blocks
    around[1:, before] = blocks[:-1, queries - half_window :]
    around[:-1, after] = blocks[1:, :half_window]
    around[0, before] = around[-1, after] = fill
    return around


def text_numbers(
    input_ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
) -> Tensor:
    """Tell the texts of a batch apart: int64 [B, T], -1 at padding; arguments as in the encoder."""
    rows, seq_len = input_ids.shape
    texts = torch.arange(rows, device=input_ids.device)[:, None].expand(rows, seq_len)
    if document_ids is not None:
        texts = texts * (seq_len + 1) + document_ids
    return texts if attention_mask is None else texts.masked_fill(~attention_mask.bool(), -1)
