"""Manifests of the HTTP service, for `render.py`: the plain one, and one behind a Gateway.

KubeRay derives the names of Services from those of its objects: `<name>-head-svc` and
`<name>-serve-svc` of a RayService, `<name>-head-svc` of a RayCluster. So all of them have names of
their own.
"""

from __future__ import annotations

import posixpath

from pods import Manifest, Values, manifest, ray_cluster

from raybert.config import build
from raybert.serve.deploy.haproxy import haproxy_environment
from raybert.serve.settings import ServeConfig

NAME, GRADUAL = "raybert-classifier", "raybert-gradual"
ENTRY = f"{GRADUAL}-entry"
TLS_PORT, GATEWAY_PORT = 443, 80  # of our Gateway, and of that which KubeRay makes


def serve_config(v: Values, host: str) -> Manifest:
    """The configuration for `serve deploy`, and for `serveConfigV2` of a RayService.

    `raybert/serve/deploy/deployment.py` derives the deployment's options from the arguments;
    options in this file would replace all of them.

    Raises:
        ConfigError: an unknown key in `serve`, or an invalid value.
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


def ray_service(v: Values, name: str, upgrade: Manifest, config: str) -> Manifest:
    """A RayService; `config` is its `serve_config` as YAML."""
    keys = {"secret": {"secretName": v["secrets"]["keys"], "defaultMode": 0o440}}
    cluster = ray_cluster(
        v,
        {"cpu": v["nodes"]["cpu"]["min"]},
        outlives_its_head=True,
        everywhere={"keys": (posixpath.dirname(v["serve"]["keys"]), keys)},
        environment=haproxy_environment(build(ServeConfig, v["serve"], "serve")),
        ports={"haproxy": v["ports"]["haproxy_metrics"]},
    )
    spec = {
        "upgradeStrategy": upgrade,
        "rayClusterDeletionDelaySeconds": v["grace_seconds"],  # for the last responses
        "excludeHeadPodFromServeSvc": True,  # it has no replica and would forward every request
        # The Service connects to the pods' addresses; every request needs a key.
        "serveConfigV2": config,
        "rayClusterConfig": cluster,
    }
    return manifest(v, "ray.io/v1", "RayService", name, spec=spec)


def plain_upgrade() -> Manifest:
    """A second cluster of full size, to which the Service then points."""
    return {"type": "NewCluster"}


def gradual_upgrade(v: Values) -> Manifest:
    """A second cluster that grows in steps, with the share of the traffic that it gets."""
    return {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": v["gateway"]["class"],
            "maxSurgePercent": v["upgrade"]["surge_percent"],
            "stepSizePercent": v["upgrade"]["step_percent"],
            "intervalSeconds": v["upgrade"]["step_seconds"],
        },
    }


def entry(v: Values) -> list[Manifest]:
    """The Gateway that clients connect to: TLS, at an address inside the cluster.

    KubeRay makes a Gateway of its own, without TLS, and weights its two clusters there; ours stands
    in front of it. The class keeps both from getting a public address, which is Istio's default.
    """
    gateway = v["gateway"]
    api = "gateway.networking.k8s.io/v1"
    of_class = {
        "apiVersion": api,
        "kind": "GatewayClass",
        "metadata": {"name": gateway["class"]},
        "spec": {"controllerName": gateway["controller"]},
    }
    defaults = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": gateway["class"],
            "namespace": gateway["namespace"],
            "labels": {"gateway.istio.io/defaults-for-class": gateway["class"]},
        },
        "data": {"service": "spec:\n  type: ClusterIP\n"},
    }
    listener = {
        "name": "https",
        "protocol": "HTTPS",
        "port": TLS_PORT,
        "tls": {"mode": "Terminate", "certificateRefs": [{"name": v["secrets"]["tls"]}]},
        "allowedRoutes": {"namespaces": {"from": "Same"}},
    }
    ours = {"gatewayClassName": gateway["class"], "listeners": [listener]}
    # Istio names the Service of a Gateway after it and its class.
    behind = {"name": f"{GRADUAL}-gateway-{gateway['class']}", "port": GATEWAY_PORT}
    route = {
        "parentRefs": [{"name": ENTRY, "sectionName": "https"}],
        "rules": [{"backendRefs": [behind]}],
    }
    return [
        of_class,
        defaults,
        manifest(v, api, "Gateway", ENTRY, spec=ours),
        manifest(v, api, "HTTPRoute", ENTRY, spec=route),
    ]
