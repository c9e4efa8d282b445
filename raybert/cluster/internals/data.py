"""Keep Ray Data's control loop from taking a trainer's processor.

While blocks wait to be consumed, which for a trainer is nearly always, the control loop of a
streaming execution polls without a pause, in Python, in the process that trains. On two cores that
cost up to half of the training speed. A poll every 50 ms is enough for blocks that last seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raybert.cluster.internals.private_names import has_private_api

_SECONDS = 0.05


def throttle(context: Any) -> None:
    """Make executions under a DataContext leave the processor to the training process."""
    if not has_private_api("data"):
        return
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class ThrottleCallback(ExecutionCallback):  # type: ignore[misc]  # of an untyped package
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(_SECONDS)

    context.custom_execution_callback_classes = [ThrottleCallback]


@contextmanager
def ordered_execution(block_bytes: int | None = None) -> Iterator[Any]:
    """Make a DataContext the current one, whose executions keep the rows' order and print nothing.

    `block_bytes` is the target size of the blocks between operators.
    """
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    if block_bytes is not None:
        context.target_max_block_size = block_bytes
    with DataContext.current(context):
        yield context
