"""Manifests of a Ray pod and a Ray cluster, for `render.py`.

The reasons for values are comments here; the rendered files have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Values = Mapping[str, Any]
Manifest = dict[str, Any]
Volumes = Mapping[str, tuple[str, Manifest]]  # name -> (mount path, source)

REDIS = "raybert-redis"
ENDING_SECONDS = 20  # of the grace period, in which Ray stops its processes after its tasks
NOTHING: Mapping[str, Any] = MappingProxyType({})

# KubeRay's label of every Ray pod, in any cluster.
RAY_POD = {"matchLabels": {"ray.io/is-ray-node": "yes"}}

# One Ray pod per node, because its requests are nearly a whole node.
ONE_POD_PER_NODE = {
    "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"labelSelector": RAY_POD, "topologyKey": "kubernetes.io/hostname"}
        ]
    }
}
GPU_NODES = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
SMALL = {"cpu": "500m", "memory": "1Gi"}  # resources of pods other than Ray nodes
LOCKED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_security(user: int, group: int) -> Manifest:
    """Run as a user other than root, with volumes owned by the group."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        "fsGroupChangePolicy": "OnRootMismatch",  # a recursive chown at every start is slow
        "seccompProfile": {"type": "RuntimeDefault"},
    }


RAYBERT_USER = pod_security(1000, 1000)  # the Dockerfile's


def manifest(v: Values, version: str, kind: str, name: str, **content: Any) -> Manifest:
    """Return an object in the namespace."""
    metadata = {"name": name, "namespace": v["namespace"]}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def guaranteed(resources: Manifest) -> Manifest:
    """Requests equal to the limits, so that the resources that Ray counts are reserved."""
    return {"requests": resources, "limits": resources}


def secret_key(name: str, key: str) -> Manifest:
    """The value of an environment variable, from a Secret."""
    return {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def ray_pod(
    v: Values,
    kind: str,
    ports: Mapping[str, int],
    extra: Volumes = NOTHING,
    environment: Mapping[str, str] = NOTHING,
) -> Manifest:
    """Return the pod template of a kind of node in `values.yaml`."""
    node, storage = v["nodes"][kind], v["storage"]
    gpus = {"nvidia.com/gpu": node["gpus"]} if "gpus" in node else {}
    volumes: Volumes = {
        # The object store; it counts towards the memory limit of the container.
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": node["shm"]}}),
        "storage": (storage["path"], {"persistentVolumeClaim": {"claimName": storage["claim"]}}),
        **extra,
    }
    environment = {
        # How long a terminating node waits for its tasks; Ray's default is 30 seconds. The head
        # waits as long, because the driver on it coordinates the checkpoints.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(v["grace_seconds"] - ENDING_SECONDS),
        **environment,
    }
    container = {
        "name": "ray",
        "image": v["images"][node["image"]],
        "resources": guaranteed({"cpu": node["cpu"], "memory": node["memory"], **gpus}),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "volumeMounts": [{"name": name, "mountPath": at} for name, (at, _) in volumes.items()],
        "securityContext": LOCKED,
    }
    spec = {
        "affinity": ONE_POD_PER_NODE,
        "tolerations": GPU_NODES if gpus else [],
        "automountServiceAccountToken": kind == "head",  # its autoscaler calls the Kubernetes API
        "terminationGracePeriodSeconds": v["grace_seconds"],
        "securityContext": RAYBERT_USER,
        "containers": [container],
        "volumes": [{"name": name, **source} for name, (_, source) in volumes.items()],
    }
    return {"spec": spec}


def ray_cluster(
    v: Values,
    workers: Mapping[str, int],
    *,
    outlives_its_head: bool = False,
    on_head: Volumes = NOTHING,
    everywhere: Volumes = NOTHING,
    environment: Mapping[str, str] = NOTHING,
    ports: Mapping[str, int] = NOTHING,
) -> Manifest:
    """The spec of a cluster.

    Args:
        v: the content of `values.yaml`.
        workers: the kinds of worker nodes and their minimum numbers.
        outlives_its_head: whether the cluster's state is kept in Redis.
        on_head: further volumes of the head.
        everywhere: further volumes of every pod.
        environment: variables that are set before Ray starts, in every pod.
        ports: further named ports of every pod.
    """
    known = v["ports"]
    worker_ports = {"metrics": known["metrics"], "serve": known["serve"], **ports}
    head_ports = {
        "gcs-server": known["gcs"],
        "dashboard": known["dashboard"],
        "as-metrics": known["autoscaler_metrics"],  # KubeRay's names of these two
        "dash-metrics": known["dashboard_metrics"],
        **worker_ports,
    }
    in_redis = {
        "gcsFaultToleranceOptions": {
            "redisAddress": f"{REDIS}:{known['redis']}",
            "redisPassword": secret_key(v["secrets"]["redis"], "password"),
        }
    }
    return {
        "rayVersion": v["ray_version"],
        # One token for all clusters of the namespace: retries and upgrades create new clusters, and
        # clients would need the token of each.
        "authOptions": {"mode": "token", "secretName": v["secrets"]["token"]},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": v["idle_seconds"],
            "resources": guaranteed(SMALL),
            "securityContext": LOCKED,
        },
        **(in_redis if outlives_its_head else {}),
        "headGroupSpec": {
            # No tasks on the head, which runs the driver and the GCS. KubeRay adds
            # dashboard-host=0.0.0.0, because operator and submitter connect to the pod's address.
            # The token and the NetworkPolicy of base.yaml restrict access.
            "rayStartParams": {"num-cpus": "0"},
            "template": ray_pod(v, "head", head_ports, {**everywhere, **on_head}, environment),
        },
        "workerGroupSpecs": [
            {
                "groupName": kind,
                "replicas": least,
                "minReplicas": least,
                "maxReplicas": max(least, v["nodes"][kind]["max"]),
                "rayStartParams": {},
                "template": ray_pod(v, kind, worker_ports, everywhere, environment),
            }
            for kind, least in workers.items()
        ],
    }
