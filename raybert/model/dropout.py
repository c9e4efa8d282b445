"""Dropout that is fast on CPUs, where PyTorch draws one random number at a time on one core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """`nn.Dropout`, four times as fast on CPUs: every 64 random bits give four draws.

    On CPUs `p` is rounded to a multiple of 1/65,536. On other devices, and in compiled models, it
    is PyTorch's dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        """Show `p` where the model is printed."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero each element of `x` with probability `p`, divide the rest by 1 - p."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # which can't trace random_
            return F.dropout(x, self.p)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        bits.random_(-(2**63), None)  # without bounds the sign bit would never be set
        threshold = min(round(self.p * 2**16), 2**16 - 1)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - threshold))
