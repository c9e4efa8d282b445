"""Manifests that all others need, for `render.py`: storage, Redis, network policies."""

from __future__ import annotations

from pods import (
    LOCKED,
    RAY_POD,
    REDIS,
    SMALL,
    Manifest,
    Values,
    guaranteed,
    manifest,
    pod_security,
    secret_key,
)

# KubeRay's label of the pod that submits the entrypoint of a RayJob to the head.
SUBMITTER = {"matchLabels": {"ray.io/originated-from-crd": "RayJob"}}


def shared_storage(v: Values) -> list[Manifest]:
    """The volume for runs, corpora and models that every node mounts."""
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": v["storage"]["size"]}},
    }
    return [manifest(v, "v1", "PersistentVolumeClaim", v["storage"]["claim"], spec=spec)]


def redis(v: Values) -> list[Manifest]:
    """One Redis with a persistent disk, which keeps a cluster's state when its head is replaced."""
    labels = {"app.kubernetes.io/name": REDIS}
    port = v["ports"]["redis"]
    container = {
        "name": "redis",
        "image": v["images"]["redis"],
        # Redis overwrites its command line, and so hides the password, when it starts.
        "args": ["--requirepass", "$(REDIS_PASSWORD)", "--appendonly", "yes"],
        "env": [{"name": "REDIS_PASSWORD", **secret_key(v["secrets"]["redis"], "password")}],
        "ports": [{"name": "redis", "containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": "redis"}},
        "resources": guaranteed(SMALL),
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "securityContext": LOCKED,
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": pod_security(999, 1000),  # user and group of the image
        "containers": [container],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": REDIS}}],
    }
    disk = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    deployment = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},  # two pods cannot mount the disk
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    service = {"selector": labels, "ports": [{"name": "redis", "port": port}]}
    return [
        manifest(v, "v1", "PersistentVolumeClaim", REDIS, spec=disk),
        manifest(v, "apps/v1", "Deployment", REDIS, spec=deployment),
        manifest(v, "v1", "Service", REDIS, spec=service),
    ]


def network_policies(v: Values) -> list[Manifest]:
    """Allowed connections: between Ray pods, and from a few clients to certain ports.

    Metrics need no token, and HAProxy binds its statistics (8404) and metrics (9101) to all
    interfaces: only Prometheus may read metrics, and no client the statistics. Serve checks keys.
    """

    def tcp(*names: str) -> list[Manifest]:
        return [{"protocol": "TCP", "port": v["ports"][name]} for name in names]

    def client(name: str) -> Manifest:
        labels = v["clients"][name]
        return {
            "namespaceSelector": {
                "matchLabels": {"kubernetes.io/metadata.name": labels["namespace"]}
            },
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": labels["label"]}},
        }

    def policy(name: str, pods: Manifest, ingress: list[Manifest]) -> Manifest:
        spec = {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress}
        return manifest(v, "networking.k8s.io/v1", "NetworkPolicy", name, spec=spec)

    ray = [
        {"from": [{"podSelector": RAY_POD}]},
        {"from": [client("operator"), {"podSelector": SUBMITTER}], "ports": tcp("dashboard")},
        {
            "from": [client("prometheus")],
            "ports": tcp("metrics", "autoscaler_metrics", "dashboard_metrics", "haproxy_metrics"),
        },
        {"ports": tcp("serve")},
    ]
    of_redis = {"matchLabels": {"app.kubernetes.io/name": REDIS}}
    return [
        policy("raybert-ray", RAY_POD, ray),
        policy(REDIS, of_redis, [{"from": [{"podSelector": RAY_POD}], "ports": tcp("redis")}]),
    ]
