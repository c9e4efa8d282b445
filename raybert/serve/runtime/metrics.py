"""Counters and latencies in Prometheus' text format, of one replica.

Ray exports what Serve itself counts (`ray_serve_*`), of all replicas; here is what only the
application knows. HAProxy sends a scrape to any one replica: the label `replica` says which. What
HAProxy refuses by itself reaches none, and is not counted.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_HELP = {
    "requests_total": "Requests by route and status.",
    "request_seconds": "Time until the answer was sent, by route.",
    "texts_total": "Texts that were scored, by model.",
    "batches_total": "Batches that were computed, by model.",
    "batch_texts_total": "Texts and windows of texts in them, by model.",
    "batch_tokens_total": "Tokens in them, by model.",
    "batch_seconds_total": "Time spent on them, by model.",
    "canary_total": "Texts that the canary answered, by whether both models gave the same label.",
    "canary_difference_total": "Sum over these of the difference between both models' scores.",
    "canary_missed_total": "Requests that the canary gave no scores for: failed, full or slow.",
    "model_loads_total": "Versions of models that were loaded, by model and outcome.",
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Adds up; all methods belong to one thread."""

    def __init__(self, **labels: str) -> None:
        """Start at nothing; `labels` stand at every line, such as the replica's name."""
        self._common: Labels = tuple(labels.items())
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._buckets: dict[Labels, list[int]] = {}
        self._seconds: dict[Labels, float] = defaultdict(float)

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter of `_HELP`."""
        self._counters[name][tuple(labels.items())] += value

    def value(self, name: str, **labels: str) -> float:
        """A counter's value."""
        return self._counters[name][tuple(labels.items())]

    def observe(self, route: str, seconds: float) -> None:
        """Note how long a request to a route took."""
        key = (("route", route),)
        buckets = self._buckets.setdefault(key, [0] * (len(_SECONDS) + 1))
        buckets[bisect.bisect_left(_SECONDS, seconds)] += 1
        self._seconds[key] += seconds

    def render(self, gauges: Mapping[str, float]) -> str:
        """Write everything as text; `gauges` are values of this moment, by name."""
        lines = []
        for name, value in gauges.items():
            lines += [f"# TYPE raybert_{name} gauge", self._line(name, (), value)]
        for name, counters in self._counters.items():
            lines += [f"# HELP raybert_{name} {_HELP[name]}", f"# TYPE raybert_{name} counter"]
            lines += [self._line(name, labels, value) for labels, value in counters.items()]
        if self._buckets:
            name = "request_seconds"
            lines += [f"# HELP raybert_{name} {_HELP[name]}", f"# TYPE raybert_{name} histogram"]
        for labels, buckets in self._buckets.items():
            total = 0
            for bound, count in zip([*map(str, _SECONDS), "+Inf"], buckets, strict=True):
                total += count
                lines.append(self._line(f"{name}_bucket", (*labels, ("le", bound)), total))
            lines.append(self._line(f"{name}_sum", labels, self._seconds[labels]))
            lines.append(self._line(f"{name}_count", labels, total))
        return "\n".join(lines) + "\n"

    def _line(self, name: str, labels: Labels, value: float) -> str:
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in (*self._common, *labels))
        return f"raybert_{name}{{{shown}}} {value:g}" if shown else f"raybert_{name} {value:g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
