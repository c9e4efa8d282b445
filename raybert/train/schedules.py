"""Learning-rate schedules: the share of the peak learning rate at a step.

All of them warm up linearly. A new one is a function and an entry in `SCHEDULES`, whose keys are
what the configuration accepts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from raybert.config import KeyOf

Config = Any  # TrainConfig, whose module imports this one

#: (steps left, steps in all, warm-up steps, settings) -> share of the peak, 0 to 1.
Schedule = Callable[[int, int, int, Config], float]


def _constant(left: int, total: int, warmup: int, config: Config) -> float:
    return 1.0


def _linear(left: int, total: int, warmup: int, config: Config) -> float:
    return left / max(1, total - warmup)


def _cosine(left: int, total: int, warmup: int, config: Config) -> float:
    """Half a cosine from 1 to 0 (arXiv 1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * (1 - left / max(1, total - warmup))))


def _stable_decay(left: int, total: int, warmup: int, config: Config) -> float:
    """Constant, then a linear decay over `decay_fraction` of the run (arXiv 2404.06395)."""
    return float(min(1.0, left / max(1, round(total * config.decay_fraction))))


SCHEDULES: dict[str, Schedule] = {
    "linear": _linear,
    "cosine": _cosine,
    "stable-decay": _stable_decay,
    "constant": _constant,
}

ScheduleName = Annotated[str, KeyOf(SCHEDULES)]


def schedule_at(step: int, total: int, warmup: int, config: Config) -> float:
    """The share of the peak learning rate at a step, 0 to 1.

    Warm-up rises linearly and reaches 1 at step `warmup`. Every schedule but `constant` then falls
    and reaches 0 at step `total`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[config.schedule](max(0, total - step), total, warmup, config)
