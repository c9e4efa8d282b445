"""How many workers a run has, where it may have a range of them.

Ray Train's own policy resizes the worker group without a checkpoint, so that every node that joins
costs the minutes since the last one. This one saves first, and counts only nodes that stay.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.train import ScalingConfig

from raybert.cluster.internals.core import draining_nodes
from raybert.cluster.internals.train_controller import (
    NodeScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from raybert.train.ray.failure_policy import FailureContext

_SAVE_SECONDS = 60  # for the checkpoint before a resize; after that it is resized without one
_REPORT_SECONDS = 30  # between two events that nodes are missing
_CONNECT_SECONDS = 2.0  # for a node to accept a connection
_CONNECTIONS = 32  # at a time


class ElasticPolicy(NodeScalingPolicy):
    """Uses as many workers as the nodes that stay can hold; saves before each change."""

    def __init__(self, scaling_config: ScalingConfig, context: FailureContext) -> None:
        super().__init__(scaling_config)
        self._context = context
        self._reported_at = float("-inf")
        self._pending: ResizeDecision | None = None
        self._requested_at = 0.0  # when the checkpoint before a resize was requested
        self._step_before = 0  # of the latest checkpoint by then

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start with as many workers as there is room for."""
        self._pending = None
        decision = super().make_decision_for_non_running_worker_group()
        now = time.monotonic()
        if isinstance(decision, NoopDecision) and now - self._reported_at > _REPORT_SECONDS:
            self._reported_at = now
            workers = self.scaling_config.min_workers
            self._context.send_event(
                "waiting", f"waiting for nodes with room for {workers} workers"
            )
        return decision

    def make_decision_for_running_worker_group(self, *args: Any, **kwargs: Any) -> Any:
        """Resize when nodes have joined: request a checkpoint first, and wait for it."""
        if self._pending is None:
            decision = super().make_decision_for_running_worker_group(*args, **kwargs)
            if isinstance(decision, ResizeDecision):
                self._pending = decision
                self._requested_at = time.monotonic()
                self._step_before = self._context.last_step()
                self._context.channel.request_save()
            return NoopDecision()
        self.keep_requesting()
        is_late = time.monotonic() - self._requested_at > _SAVE_SECONDS
        if not is_late and self._context.last_step() <= self._step_before:
            return NoopDecision()
        decision, self._pending = self._pending, None
        self._context.send_event("resize", f"continuing with {decision.num_workers} workers")
        return decision

    def usable_cpus(self) -> dict[str, float]:
        """The CPUs of the nodes that are alive and will stay, by node id.

        Ray's coordinator may be 20 seconds behind, and the head itself up to a minute.
        """
        leaving = draining_nodes()
        listed = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            reachable = threads.map(accepts_connections, listed)
        return {
            node["NodeID"]: node["Resources"].get("CPU", 0)
            for node, is_reachable in zip(listed, reachable, strict=True)
            if is_reachable
        }


def accepts_connections(node: Mapping[str, Any]) -> bool:
    """Whether a node, as `ray.nodes` describes it, accepts connections.

    A node that is gone stays on Ray's list until some health checks have failed. Workers that are
    placed there in the meantime, or Ray Data's CPU for them, wait for it in vain.
    """
    try:
        with socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), _CONNECT_SECONDS
        ):
            return True
    except OSError:
        return False
