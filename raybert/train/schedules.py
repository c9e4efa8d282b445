"""Learning-rate schedules: the share of the peak learning rate at a step.

All of them warm up linearly. A new one is a function and an entry in `SCHEDULES`, whose keys are
what the configuration accepts; a setting of it is a field of `ScheduleConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from raybert.config import KeyOf, Settings


def _constant(left: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    return 1.0


def _linear(left: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    return left / max(1, total - warmup)


def _cosine(left: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    """Half a cosine from 1 to 0 (arXiv 1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * (1 - left / max(1, total - warmup))))


def _stable_decay(left: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    """Constant, then a linear decay over `decay_fraction` of the run (arXiv 2404.06395)."""
    return float(min(1.0, left / max(1, round(total * config.decay_fraction))))


#: (steps left, steps in all, warm-up steps, settings) -> share of the peak, 0 to 1.
SCHEDULES: dict[str, Callable[[int, int, int, ScheduleConfig], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "stable-decay": _stable_decay,
    "constant": _constant,
}

ScheduleName = Annotated[str, KeyOf(SCHEDULES)]


class ScheduleConfig(Settings):
    """The schedule and its settings."""

    schedule: ScheduleName = Field(
        "linear",
        description="the learning rate after warm-up: all but `constant` lower it to zero",
    )
    warmup_fraction: float = Field(0.06, ge=0, lt=1, description="share of the run that warms up")
    decay_fraction: float = Field(
        0.3, gt=0, le=1, description="share of the run that `stable-decay` takes to decay"
    )


def schedule_at(step: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    """The share of the peak learning rate at a step, 0 to 1.

    Warm-up rises linearly and reaches 1 at step `warmup`; the schedule decides on the steps after.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[config.schedule](max(0, total - step), total, warmup, config)
