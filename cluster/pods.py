"""A Ray pod, and a cluster of them, for `render.py`.

Why a value is what it is stands here, beside it; the files that come out are for `kubectl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Values = Mapping[str, Any]
Manifest = dict[str, Any]
Volumes = Mapping[str, tuple[str, Manifest]]  # name -> (where it is mounted, what it is)

REDIS = "raybert-redis"
ENDING_SECONDS = 20  # of the grace: Ray ends its own processes once its tasks have left
NOTHING: Mapping[str, Any] = MappingProxyType({})

# KubeRay's own label: it stands on every pod of Ray, whichever cluster that belongs to.
RAY_POD = {"matchLabels": {"ray.io/is-ray-node": "yes"}}

# A Ray pod takes a node's memory and cores; two of them would each believe they had all of it.
ALONE = {
    "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"labelSelector": RAY_POD, "topologyKey": "kubernetes.io/hostname"}
        ]
    }
}
GPU_NODES = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
SMALL = {"cpu": "500m", "memory": "1Gi"}  # of what is no Ray node
LOCKED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_security(user: int, group: int) -> Manifest:
    """Nobody is root, and volumes belong to the group."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        "fsGroupChangePolicy": "OnRootMismatch",  # a chown of every file at every start takes long
        "seccompProfile": {"type": "RuntimeDefault"},
    }


RAYBERT_USER = pod_security(1000, 1000)  # the Dockerfile's


def manifest(v: Values, version: str, kind: str, name: str, **content: Any) -> Manifest:
    """An object of the namespace."""
    metadata = {"name": name, "namespace": v["namespace"]}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def alike(resources: Manifest) -> Manifest:
    """Requests that equal the limits: what Ray is told that it has is never taken from it."""
    return {"requests": resources, "limits": resources}


def secret_key(name: str, key: str) -> Manifest:
    """The value of an environment variable that comes from a Secret."""
    return {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def ray_pod(
    v: Values,
    kind: str,
    ports: Mapping[str, int],
    extra: Volumes = NOTHING,
    environment: Mapping[str, str] = NOTHING,
) -> Manifest:
    """The template of a Ray pod: a node of the kind that `values.yaml` describes."""
    node, storage = v["nodes"][kind], v["storage"]
    gpus = {"nvidia.com/gpu": node["gpus"]} if "gpus" in node else {}
    volumes: Volumes = {
        # The object store. It counts as memory of the container, within its limit.
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": node["shm"]}}),
        "storage": (storage["path"], {"persistentVolumeClaim": {"claimName": storage["claim"]}}),
        **extra,
    }
    environment = {
        # How long a node that is told to end waits for its tasks; by itself Ray gives them 30
        # seconds. The head waits as long, for it leads the others' checkpoints.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(v["grace_seconds"] - ENDING_SECONDS),
        **environment,
    }
    container = {
        "name": "ray",
        "image": v["images"][node["image"]],
        "resources": alike({"cpu": node["cpu"], "memory": node["memory"], **gpus}),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "volumeMounts": [{"name": name, "mountPath": at} for name, (at, _) in volumes.items()],
        "securityContext": LOCKED,
    }
    spec = {
        "affinity": ALONE,
        "tolerations": GPU_NODES if gpus else [],
        "automountServiceAccountToken": kind == "head",  # its autoscaler asks Kubernetes for nodes
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
) -> Manifest:
    """The spec of a cluster.

    Args:
        v: what `values.yaml` says.
        workers: the kinds of its workers, and how many there are at least.
        outlives_its_head: whether the cluster's state is kept in Redis.
        on_head: more volumes of the head.
        everywhere: more volumes of every pod.
        environment: variables that every pod has before Ray starts.
    """
    ports = v["ports"]
    of_workers = {"metrics": ports["metrics"], "serve": ports["serve"]}
    of_head = {"gcs-server": ports["gcs"], "dashboard": ports["dashboard"], **of_workers}
    in_redis = {
        "gcsFaultToleranceOptions": {
            "redisAddress": f"{REDIS}:{ports['redis']}",
            "redisPassword": secret_key(v["secrets"]["redis"], "password"),
        }
    }
    return {
        "rayVersion": v["ray_version"],
        # One token for all clusters of the namespace: retries and upgrades make new clusters, and
        # whoever submits would have to look for each one's own.
        "authOptions": {"mode": "token", "secretName": v["secrets"]["token"]},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": v["idle_seconds"],
            "resources": alike(SMALL),
            "securityContext": LOCKED,
        },
        **(in_redis if outlives_its_head else {}),
        "headGroupSpec": {
            # No task may crowd out the driver and the cluster's state. KubeRay adds
            # dashboard-host=0.0.0.0: operator and submitter come to the pod's address from outside
            # it. The token and base.yaml's NetworkPolicy say who may.
            "rayStartParams": {"num-cpus": "0"},
            "template": ray_pod(v, "head", of_head, {**everywhere, **on_head}, environment),
        },
        "workerGroupSpecs": [
            {
                "groupName": kind,
                "replicas": least,
                "minReplicas": least,
                "maxReplicas": max(least, v["nodes"][kind]["max"]),
                "rayStartParams": {},
                "template": ray_pod(v, kind, of_workers, everywhere, environment),
            }
            for kind, least in workers.items()
        ],
    }
