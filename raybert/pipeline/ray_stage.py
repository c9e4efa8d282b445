"""Start Ray for one stage or several, and show that it starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from raybert.cluster.session import Resources, ray_session
from raybert.experiment import Experiment
from raybert.terminal.display import Display


def first_progress() -> str:
    """What a stage on Ray does first."""
    ray = sys.modules.get("ray")
    return "starting" if ray is not None and ray.is_initialized() else "starting Ray"


@contextmanager
def shown_ray_session(
    experiment: Experiment, display: Display, workers: int
) -> Iterator[Resources]:
    """As `ray_session`, with a line of progress until Ray answers."""
    with ExitStack() as stack:
        with display.stage("ray"):
            resources = stack.enter_context(ray_session(experiment.ray, workers))
        yield resources
