"""The metrics of a replica, as a Prometheus registry of its own; all their names are here.

Ray exports what Serve itself counts (`ray_serve_*`); these are the figures that only the
application knows. HAProxy sends a scrape to any one replica, which asks the others for theirs: the
label `replica` says whose they are. What HAProxy rejects itself, it counts itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
#: Counters, with their labels.
_COUNTERS = {
    "requests_total": ("Requests by route and status.", ("route", "status")),
    "texts_total": ("Texts that were scored, by model.", ("model",)),
    "batches_total": ("Batches that were computed, by model.", ("model",)),
    "batch_texts_total": ("Texts and windows of texts in them, by model.", ("model",)),
    "batch_tokens_total": ("Tokens in them, by model.", ("model",)),
    "batch_seconds_total": ("Seconds spent on them, by model.", ("model",)),
    "canary_total": (
        "Texts that the canary scored, by whether both models gave the same label.",
        ("model", "agree"),
    ),
    "canary_difference_total": (
        "Sum over these of the difference between both models' scores.",
        ("model",),
    ),
    "canary_missed_total": (
        "Requests that the canary did not score: it failed, was full or slow.",
        ("model",),
    ),
    "model_loads_total": (
        "Versions of models that were loaded, by model and outcome.",
        ("model", "outcome"),
    ),
}

# A `_created` series for every counter would double what a scrape transfers.
disable_created_metrics()  # type: ignore[no-untyped-call]


class ServeMetrics:
    """Counters, a latency histogram, and the length of the queue."""

    def __init__(self, **constant_labels: str) -> None:
        """Start at zero; `constant_labels`, such as the replica's name, are added to every line."""
        self.registry = CollectorRegistry()
        self._constant = constant_labels
        self._counters = {
            name: Counter(
                f"raybert_{name}", text, [*constant_labels, *labels], registry=self.registry
            )
            for name, (text, labels) in _COUNTERS.items()
        }
        self._seconds = Histogram(
            "raybert_request_seconds",
            "Seconds until the response was sent, by route.",
            [*constant_labels, "route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        # `labels()` takes 10 µs, twice for every request.
        self._labelled = functools.cache(
            lambda metric, **labels: metric.labels(**constant_labels, **labels)
        )

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to one of the counters."""
        self._labelled(self._counters[name], **labels).inc(value)

    def read(self, name: str, **labels: str) -> float:
        """Return one of the counters; 0 where nothing was added."""
        found = self.registry.get_sample_value(f"raybert_{name}", {**self._constant, **labels})
        return found or 0.0

    def observe(self, route: str, seconds: float) -> None:
        """Record how long a request to a route took."""
        self._labelled(self._seconds, route=route).observe(seconds)

    def watch_queue(self, read: Callable[[], float]) -> None:
        """Add the length of the queue, which `read` returns at each scrape."""
        gauge = Gauge(
            "raybert_queued_tokens",
            "Tokens that wait in the queues of all models.",
            list(self._constant),
            registry=self.registry,
        )
        (gauge.labels(**self._constant) if self._constant else gauge).set_function(read)

    def families(self) -> list[Metric]:
        """Return all metrics as they are now."""
        return list(self.registry.collect())


class _Collected:
    """Metrics that were collected before, as a registry of prometheus_client."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def render(replicas: Iterable[Iterable[Metric]], refused: int | None = None) -> str:
    """Return the metrics of some replicas in Prometheus' text format.

    `refused` is the number of requests that HAProxy rejected itself; None: unknown.
    """
    families: dict[str, Metric] = {}
    for family in itertools.chain.from_iterable(replicas):
        empty = Metric(family.name, family.documentation, family.type)
        families.setdefault(family.name, empty).samples.extend(family.samples)
    if refused is not None:
        counted = CounterMetricFamily(
            "raybert_refused_by_haproxy",
            "Requests that HAProxy answered 429 itself, while all replicas were full.",
            refused,
        )
        families[counted.name] = counted
    collected: Any = _Collected(list(families.values()))
    return generate_latest(collected).decode()
