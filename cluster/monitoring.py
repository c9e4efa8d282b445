"""Manifests for Prometheus' operator, for `render.py`: what to scrape, and the alerts."""

from __future__ import annotations

from pathlib import Path

import yaml
from pods import RAY_POD, Manifest, Values, manifest

ALERTS = Path(__file__).resolve().parent / "prometheus/alerts.yml"
#: Names of container ports with metrics. A pod without one of them is not asked for it.
PORTS = ("metrics", "as-metrics", "dash-metrics", "haproxy")


def monitors(v: Values) -> list[Manifest]:
    """A PodMonitor of every Ray pod, and the rules of `prometheus/alerts.yml`."""
    labels = {"release": v["clients"]["prometheus"]["release"]}  # by which the operator selects
    by_cluster = {
        "action": "replace",
        "sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"],
        "targetLabel": "ray_io_cluster",
    }
    pods = {
        "selector": RAY_POD,
        "podMetricsEndpoints": [{"port": port, "relabelings": [by_cluster]} for port in PORTS],
    }
    rules = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    api = "monitoring.coreos.com/v1"
    made = [
        manifest(v, api, "PodMonitor", "raybert", spec=pods),
        manifest(v, api, "PrometheusRule", "raybert", spec=rules),
    ]
    for monitor in made:
        monitor["metadata"]["labels"] = labels
    return made
