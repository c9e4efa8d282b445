"""Write `cluster/kuberay/` and `cluster/serve.yaml` from `cluster/values.yaml`.

    python cluster/render.py            # write
    python cluster/render.py --check    # exit 1 where a committed file is another one

Every manifest is a dictionary that a few functions build: a Ray pod is described ten times there,
and once in `pods.py`. YAML's anchors end with their document, and a template is a language more.
"""

from __future__ import annotations

import argparse
import math
import posixpath
import sys
from pathlib import Path
from typing import Any

import yaml
from pods import (
    LOCKED,
    RAY_POD,
    RAYBERT_USER,
    REDIS,
    SMALL,
    Manifest,
    Values,
    alike,
    manifest,
    pod_security,
    ray_cluster,
    secret_key,
)

from raybert.config import build
from raybert.serve.deploy.haproxy import haproxy_environment
from raybert.serve.settings import ServeConfig

HERE = Path(__file__).resolve().parent
CONFIG = "/etc/raybert/experiment.yaml"  # in a job's head
# KubeRay's label of the pod that hands a RayJob's entrypoint to the head.
SUBMITTER = {"matchLabels": {"ray.io/originated-from-crd": "RayJob"}}


def shared_storage(v: Values) -> list[Manifest]:
    """The volume that every node reads and writes: runs, corpora, models."""
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": v["storage"]["size"]}},
    }
    return [manifest(v, "v1", "PersistentVolumeClaim", v["storage"]["claim"], spec=spec)]


def redis(v: Values) -> list[Manifest]:
    """Where a cluster's state outlives its head: one Redis that writes to a disk."""
    labels = {"app.kubernetes.io/name": REDIS}
    port = v["ports"]["redis"]
    container = {
        "name": "redis",
        "image": v["images"]["redis"],
        # Redis replaces its command line, and with it the password, as soon as it runs.
        "args": ["--requirepass", "$(REDIS_PASSWORD)", "--appendonly", "yes"],
        "env": [{"name": "REDIS_PASSWORD", **secret_key(v["secrets"]["redis"], "password")}],
        "ports": [{"name": "redis", "containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": "redis"}},
        "resources": alike(SMALL),
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "securityContext": LOCKED,
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": pod_security(999, 1000),  # the image's own
        "containers": [container],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": REDIS}}],
    }
    disk = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    deployment = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},  # the disk is one pod's at a time
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
    """Who may come in: Ray among itself, and a few guests, each to its own ports.

    Metrics ask for no token, and HAProxy binds its statistics (8404) and metrics (9101) to all
    interfaces: Prometheus alone sees metrics, nobody the statistics. Serve asks for a key itself.
    """

    def tcp(*names: str) -> list[Manifest]:
        return [{"protocol": "TCP", "port": v["ports"][name]} for name in names]

    def guest(name: str) -> Manifest:
        who = v["guests"][name]
        return {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": who["namespace"]}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": who["label"]}},
        }

    def policy(name: str, pods: Manifest, ingress: list[Manifest]) -> Manifest:
        spec = {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress}
        return manifest(v, "networking.k8s.io/v1", "NetworkPolicy", name, spec=spec)

    ray = [
        {"from": [{"podSelector": RAY_POD}]},
        {"from": [guest("operator"), {"podSelector": SUBMITTER}], "ports": tcp("dashboard")},
        {
            "from": [guest("prometheus")],
            "ports": tcp("metrics", "autoscaler_metrics", "dashboard_metrics", "haproxy_metrics"),
        },
        {"ports": tcp("serve")},
    ]
    of_redis = {"matchLabels": {"app.kubernetes.io/name": REDIS}}
    return [
        policy("raybert-ray", RAY_POD, ray),
        policy(REDIS, of_redis, [{"from": [{"podSelector": RAY_POD}], "ports": tcp("redis")}]),
    ]


def ray_job(v: Values, command: str, entrypoint: str, experiment: str) -> list[Manifest]:
    """A command in a cluster of its own, with as many GPUs as its training processes.

    It starts with all its workers: raybert refuses a cluster that lacks them, rather than wait.
    No Redis: the driver runs on the head, and does not outlive it.
    """
    name = f"raybert-{command}"
    section = "finetune" if command == "tune" else command
    processes = yaml.safe_load(experiment)[section]["workers"]
    if isinstance(processes, dict):  # a range: it grows as the autoscaler brings nodes
        processes = processes.get("min", 1)
    workers = {
        "cpu": v["nodes"]["cpu"]["min"],
        "gpu": math.ceil(processes / v["nodes"]["gpu"]["gpus"]),
    }
    configured = {"config": (posixpath.dirname(CONFIG), {"configMap": {"name": name}})}
    submitter = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": RAYBERT_USER,
        "containers": [
            {
                "name": "ray-job-submitter",
                "image": v["images"][v["nodes"]["head"]["image"]],
                "resources": alike(SMALL),
                "securityContext": LOCKED,
            }
        ],
    }

    def delete_cluster(seconds: int, **condition: str) -> Manifest:
        return {"policy": "DeleteCluster", "condition": {**condition, "ttlSeconds": seconds}}

    spec = {
        "submissionMode": "K8sJobMode",
        "entrypoint": entrypoint,
        "backoffLimit": 3,
        # The cluster stays a while, for its logs. KubeRay can't take its workers away earlier where
        # there is an autoscaler.
        "deletionStrategy": {
            "deletionRules": [
                delete_cluster(600, jobStatus="SUCCEEDED"),
                delete_cluster(3600, jobStatus="FAILED"),
                delete_cluster(3600, jobDeploymentStatus="Failed"),
            ]
        },
        "submitterPodTemplate": {"spec": submitter},
        "rayClusterSpec": ray_cluster(v, workers, on_head=configured),
    }
    config = {posixpath.basename(CONFIG): experiment}
    return [
        manifest(v, "v1", "ConfigMap", name, data=config),
        manifest(v, "ray.io/v1", "RayJob", name, spec=spec),
    ]


def serve_config(v: Values, host: str) -> Manifest:
    """What `serve deploy` reads, and a RayService in its `serveConfigV2`.

    The deployment's options follow from the arguments, in `raybert/serve/deploy/deployment.py`:
    written down here, too, they would be replaced as a whole.

    Raises:
        ConfigError: an unknown key in `serve`, or a value that does not fit.
    """
    build(ServeConfig, v["serve"], "serve")
    application = {
        "name": "raybert",
        "route_prefix": "/",
        "import_path": "raybert.serve.deploy.deployment:build",
        "args": v["serve"],
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": v["ports"]["serve"]},
        "applications": [application],
    }


def ray_service(v: Values) -> Manifest:
    """The classifier behind HTTP, upgraded step by step into a second cluster."""
    keys = {"secret": {"secretName": v["secrets"]["keys"], "defaultMode": 0o440}}
    cluster = ray_cluster(
        v,
        {"cpu": v["nodes"]["cpu"]["min"]},
        outlives_its_head=True,
        everywhere={"keys": (posixpath.dirname(v["serve"]["keys"]), keys)},
        environment=haproxy_environment(build(ServeConfig, v["serve"], "serve")),
    )
    spec = {
        # Half as many nodes again while it lasts; a plain new cluster takes twice as many.
        "upgradeStrategy": {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {
                "gatewayClassName": "istio",
                "maxSurgePercent": 50,
                "stepSizePercent": 25,
                "intervalSeconds": 30,
            },
        },
        "rayClusterDeletionDelaySeconds": v["grace_seconds"],  # the old one's last answers
        "excludeHeadPodFromServeSvc": True,  # it has no replica: a detour for every request
        # The Service comes to the pods' addresses. Nobody is answered without a key.
        "serveConfigV2": as_yaml(serve_config(v, "0.0.0.0")),
        "rayClusterConfig": cluster,
    }
    return manifest(v, "ray.io/v1", "RayService", "raybert", spec=spec)


def files(v: Values, experiment: str) -> dict[str, str]:
    """Every file that is written, by its path under `cluster/`."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": v["namespace"]}}
    least = {kind: v["nodes"][kind]["min"] for kind in ("cpu", "gpu")}
    cluster = ray_cluster(v, least, outlives_its_head=True)
    run = f"python -m raybert {{}} -c {CONFIG}".format
    pretrain = f"sh -c '{run('corpus')} && exec {run('pretrain')} --json'"
    # A trial has one worker: many at a time, and no process group to start. It is not limited by
    # minutes, for how many steps they are would depend on its neighbours.
    each = "--set finetune.workers=1 --set finetune.minutes=null --set finetune.epochs=2"
    each += " --set finetune.evaluations=null"  # after every epoch, where ASHA compares trials
    tune = f"{run('tune')} --trials {v['trials']} {each} --json"
    again = (
        "A retry makes a new cluster, and two attempts can overlap: raybert's runs fence their\n"
        "writers themselves, and go on from the last checkpoint."
    )
    return {
        "kuberay/base.yaml": as_file(
            "What the other files stand on: namespace, shared storage, Redis, network policies.",
            *(namespace, *shared_storage(v), *redis(v), *network_policies(v)),
        ),
        "kuberay/raycluster.yaml": as_file(
            "A cluster that stays, for `raybert submit`.",
            manifest(v, "ray.io/v1", "RayCluster", "raybert", spec=cluster),
        ),
        "kuberay/rayjob-pretrain.yaml": as_file(
            f"Corpus and pretraining in a cluster of their own.\n{again}",
            *ray_job(v, "pretrain", pretrain, experiment),
        ),
        "kuberay/rayjob-tune.yaml": as_file(
            f"A search over fine-tuning, once there is a pretrained model.\n{again}",
            *ray_job(v, "tune", tune, experiment),
        ),
        "kuberay/rayservice.yaml": as_file(
            "The classifier behind HTTP. Its upgrade needs KubeRay 1.7 and Istio's Gateway class.",
            ray_service(v),
        ),
        "serve.yaml": as_file(
            "For `serve deploy` to a cluster that is there; the application of rayservice.yaml.\n"
            "On 127.0.0.1: set http_options.host to 0.0.0.0 to answer others, who need a key.",
            serve_config(v, "127.0.0.1"),
        ),
    }


class _Dumper(yaml.SafeDumper):
    """PyYAML's, without aliases, and with texts of many lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never write `&id001`: nobody reads it gladly, and `kubectl diff` neither."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def as_yaml(content: Manifest) -> str:
    """A manifest's text; what is empty is left out."""
    return yaml.dump(_without_empty_lists(content), Dumper=_Dumper, sort_keys=False, width=1000)


def _without_empty_lists(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_empty_lists(x) for key, x in content.items() if x != []}
    return [_without_empty_lists(x) for x in content] if isinstance(content, list) else content


def as_file(comment: str, *documents: Manifest) -> str:
    """A file of manifests, with what it is for on top."""
    told = f"{comment}\nWritten by cluster/render.py: change cluster/values.yaml."
    head = "".join(f"# {line}\n" for line in told.splitlines())
    return head + "---\n".join(map(as_yaml, documents))


def main() -> None:
    """Write the files, or say which are not what they should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    check = parser.parse_args().check
    values = yaml.safe_load((HERE / "values.yaml").read_text(encoding="utf-8"))
    experiment = (HERE / values["experiment"]).read_text(encoding="utf-8")
    stale = []
    for name, text in files(values, experiment).items():
        path = HERE / name
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"cluster/{name}")
    if stale:
        sys.exit(f"{', '.join(stale)}: not what values.yaml says; run python cluster/render.py")


if __name__ == "__main__":
    main()
