"""The precisions of training: weights stay in fp32, forward and backward may compute in bf16."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated

import torch

from raybert.cluster.machine import has_fast_bf16
from raybert.config import KeyOf

#: The settings of `precision`: whether a device computes in bf16.
TRAIN_PRECISIONS: dict[str, Callable[[torch.device], bool]] = {
    "auto": has_fast_bf16,
    "bf16": lambda device: True,
    "fp32": lambda device: False,
}

PrecisionName = Annotated[str, KeyOf(TRAIN_PRECISIONS)]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context in which the model runs on a device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=TRAIN_PRECISIONS[precision](device))
