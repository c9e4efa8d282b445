"""Keep Ray Data's control loop from taking a trainer's processor.

While blocks wait to be consumed, which for a trainer is nearly always, the control loop of a
streaming execution polls without a pause, in Python, in the process that trains. On two cores that
cost up to half of the training speed. A poll every 50 ms is enough for blocks that last seconds.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

_SECONDS = 0.05


class ThrottleCallback(ExecutionCallback):  # type: ignore[misc]  # of an untyped package
    """Sleeps after every step of the control loop."""

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for 50 ms."""
        time.sleep(_SECONDS)
