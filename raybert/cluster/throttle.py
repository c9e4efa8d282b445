"""Keep Ray Data's control loop from taking a trainer's processor.

While its blocks wait to be consumed, which for a trainer is nearly always, the loop of a streaming
execution does not wait for anything: it runs in Python as fast as it can, in the process that
trains. On two cores that cost up to half of the training speed. One look every 50 ms is plenty for
blocks that last for seconds.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

_SECONDS = 0.05


class ThrottleCallback(ExecutionCallback):  # type: ignore[misc]  # of an untyped package
    """Sleeps at every turn of the control loop; set as one of a context's callback classes."""

    def on_execution_step(self, executor: Any) -> None:
        """Wait a little."""
        time.sleep(_SECONDS)
