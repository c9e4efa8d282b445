"""How many replicas Serve runs: by the work of each, which is what decides about its queue, too.

A replica's load is the share of the time for which it computed, plus the work that waits in seconds
of `queue_s`: 0 when it is idle, 1 when it computes all the time, 2 when its queue is full as well.
Requests alone say little about that: one may have a text or a hundred. Serve's controller imports
this module, which therefore imports nothing.
"""

from __future__ import annotations

from typing import Any

LOAD = "raybert_load"  # the name of the load among the replicas' figures
TARGET_LOAD = 0.7  # of each replica: below it requests rarely wait


def count_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """Return how many replicas there should be, for Serve's `AutoscalingContext`.

    As many as share the load at TARGET_LOAD, and the running requests at `target`. Serve rounds up,
    keeps to the limits, and waits before it acts.
    """
    loads = (context.aggregated_metrics or {}).get(LOAD, {})
    by_work = sum(loads.values()) / TARGET_LOAD
    by_requests = context.total_num_requests / context.config.target_ongoing_requests
    return max(by_work, by_requests), {}
