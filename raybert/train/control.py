"""How a run is ended, or asked for a checkpoint, from outside of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raybert.errors import RaybertError


class Stopped(RaybertError):
    """The run was asked to stop; its state is in a checkpoint."""


class Preempted(RaybertError):
    """A worker's node will be taken away; the run's state is in a checkpoint."""


@dataclass(frozen=True)
class ControlSignals:
    """Requests from outside, polled before every step; each may come from any rank."""

    stop: Callable[[], bool] = lambda: False  # save and end the run
    preempt: Callable[[], bool] = lambda: False  # save and end: this rank's node will be taken away
    save: Callable[[], bool] = lambda: False  # write a checkpoint now


NO_SIGNALS = ControlSignals()
