"""Private parts of Ray Data."""

from __future__ import annotations

from typing import Any

from raybert.cluster.internals.hooks import check


def throttle(context: Any) -> None:
    """Make executions under a DataContext leave the processor to the training process."""
    if check("data"):
        from raybert.cluster.internals.throttle import ThrottleCallback

        context.custom_execution_callback_classes = [ThrottleCallback]
