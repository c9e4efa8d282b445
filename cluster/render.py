"""Write `cluster/kuberay/` and `cluster/serve.yaml` from `cluster/values.yaml`.

    python cluster/render.py            # write
    python cluster/render.py --check    # exit 1 if a committed file differs

Python functions build every manifest as a dictionary, because the manifests contain ten similar Ray
pods: YAML anchors do not cross documents, and templates would add a language.
"""

from __future__ import annotations

import argparse
import math
import posixpath
import sys
from pathlib import Path
from typing import Any

import yaml
from base import network_policies, redis, shared_storage
from monitoring import monitors
from pods import (
    LOCKED,
    RAYBERT_USER,
    SMALL,
    Manifest,
    Values,
    guaranteed,
    manifest,
    ray_cluster,
)
from services import (
    ENTRY,
    GRADUAL,
    NAME,
    entry,
    gradual_upgrade,
    plain_upgrade,
    ray_service,
    serve_config,
)

HERE = Path(__file__).resolve().parent
CONFIG = "/etc/raybert/experiment.yaml"  # on the head of a job


def ray_job(v: Values, command: str, entrypoint: str, experiment: str) -> list[Manifest]:
    """A command in its own cluster, with a GPU for each training process.

    The cluster starts with all workers, because raybert rejects a cluster with too few. It needs no
    Redis, because the driver runs on the head and ends with it.
    """
    name = f"raybert-{command}"
    section = "finetune" if command == "tune" else command
    processes = yaml.safe_load(experiment)[section]["workers"]
    if isinstance(processes, dict):  # a range grows as the autoscaler adds nodes
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
                "resources": guaranteed(SMALL),
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
        # The cluster is kept for some time for its logs. With an autoscaler KubeRay can't delete
        # the workers earlier.
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


def install(v: Values, what: str) -> str:
    """The commands, as lines of a comment, that install what a file needs."""
    versions, clients, spaces = v["versions"], v["clients"], v["gateway"]["namespace"]
    crds = "https://github.com/kubernetes-sigs/gateway-api/releases/download"
    crds = f"{crds}/{versions['gateway_api']}/standard-install.yaml"
    lines = {
        "kuberay": [
            "helm repo add kuberay https://ray-project.github.io/kuberay-helm",
            "helm install kuberay-operator kuberay/kuberay-operator --version "
            f"{versions['kuberay']} -n {clients['operator']['namespace']} --create-namespace",
        ],
        "gateway": [
            f"kubectl apply --server-side -f {crds}",
            "helm repo add istio https://istio-release.storage.googleapis.com/charts",
            f"helm install istio-base istio/base --version {versions['istio']} -n {spaces} "
            "--create-namespace",
            f"helm install istiod istio/istiod --version {versions['istio']} -n {spaces} --wait",
            f"kubectl -n {v['namespace']} create secret tls {v['secrets']['tls']} --cert=tls.crt "
            "--key=tls.key",
        ],
        "prometheus": [
            "helm repo add prometheus-community https://prometheus-community.github.io/helm-charts",
            f"helm install {clients['prometheus']['release']} "
            f"prometheus-community/kube-prometheus-stack --version {versions['prometheus_stack']} "
            f"-n {clients['prometheus']['namespace']} --create-namespace",
        ],
    }
    return "\n".join(f"  {line}" for line in lines[what])


def entry_host(v: Values) -> str:
    """The name of the Gateway's Service, as Istio makes it."""
    return f"{ENTRY}-{v['gateway']['class']}.{v['namespace']}.svc"


def files(v: Values, experiment: str) -> dict[str, str]:
    """Return the text of every file by its path under `cluster/`."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": v["namespace"]}}
    served = as_yaml(serve_config(v, "0.0.0.0"))
    least = {kind: v["nodes"][kind]["min"] for kind in ("cpu", "gpu")}
    cluster = ray_cluster(v, least, outlives_its_head=True)
    run = f"python -m raybert {{}} -c {CONFIG}".format
    pretrain = f"sh -c '{run('corpus')} && exec {run('pretrain')} --json'"
    # Trials have one worker: many run at once, without a process group. They have no time limit,
    # because concurrent trials would change the number of steps in it.
    each = "--set finetune.workers=1 --set finetune.minutes=null --set finetune.epochs=2"
    each += " --set finetune.evaluations=null"  # after every epoch, for ASHA
    tune = f"{run('tune')} --trials {v['trials']} {each} --json"
    again = (
        "A retry creates a new cluster, and two attempts can overlap: raybert fences the writers\n"
        "of a run, and resumes from its last checkpoint."
    )
    return {
        "kuberay/base.yaml": as_file(
            "Required by the other files: namespace, shared storage, Redis, network policies. "
            f"KubeRay first:\n{install(v, 'kuberay')}",
            *(namespace, *shared_storage(v), *redis(v), *network_policies(v)),
        ),
        "kuberay/raycluster.yaml": as_file(
            "A permanent cluster for `raybert submit`.",
            manifest(v, "ray.io/v1", "RayCluster", "raybert", spec=cluster),
        ),
        "kuberay/rayjob-pretrain.yaml": as_file(
            f"Corpus and pretraining in their own cluster.\n{again}",
            *ray_job(v, "pretrain", pretrain, experiment),
        ),
        "kuberay/rayjob-tune.yaml": as_file(
            f"A search over fine-tuning; needs a pretrained model.\n{again}",
            *ray_job(v, "tune", tune, experiment),
        ),
        "kuberay/rayservice.yaml": as_file(
            f"The HTTP service, at {NAME}-serve-svc:{v['ports']['serve']}.\n"
            "It needs KubeRay alone; an upgrade needs as many nodes again.",
            ray_service(v, NAME, plain_upgrade(), served),
        ),
        "kuberay/rayservice-gateway.yaml": as_file(
            f"The same service behind a Gateway with TLS, at https://{entry_host(v)}:\n"
            f"an upgrade needs {v['upgrade']['surge_percent']}% more nodes, and moves the traffic "
            f"in steps.\nIt needs Istio, and a certificate for that name:\n{install(v, 'gateway')}",
            *entry(v),
            ray_service(v, GRADUAL, gradual_upgrade(v), served),
        ),
        "kuberay/monitoring.yaml": as_file(
            "What Prometheus scrapes, and the alerts of prometheus/alerts.yml, for its operator:\n"
            f"{install(v, 'prometheus')}",
            *monitors(v),
        ),
        "serve.yaml": as_file(
            "For `serve deploy` to an existing cluster; the application of rayservice.yaml.\n"
            "Listens on 127.0.0.1: set http_options.host to 0.0.0.0 for others, who need a key.",
            serve_config(v, "127.0.0.1"),
        ),
    }


class _Dumper(yaml.SafeDumper):
    """PyYAML's, without aliases, and with multi-line texts in block style."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never write aliases such as `&id001`, which obscure `kubectl diff`."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def as_yaml(content: Manifest) -> str:
    """Return a manifest as YAML, without empty lists."""
    return yaml.dump(_without_empty_lists(content), Dumper=_Dumper, sort_keys=False, width=1000)


def _without_empty_lists(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_empty_lists(x) for key, x in content.items() if x != []}
    return [_without_empty_lists(x) for x in content] if isinstance(content, list) else content


def as_file(comment: str, *documents: Manifest) -> str:
    """Return a file of manifests that begins with a comment."""
    comment = f"{comment}\nWritten by cluster/render.py: change cluster/values.yaml."
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + "---\n".join(map(as_yaml, documents))


def main() -> None:
    """Write the files, or report those that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare without writing")
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
        sys.exit(f"{', '.join(stale)}: differ from values.yaml; run python cluster/render.py")


if __name__ == "__main__":
    main()
