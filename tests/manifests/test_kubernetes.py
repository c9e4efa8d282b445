"""KubeRay's manifests against its CRDs, core objects against Kubernetes' schemas, and our laws."""

import copy
import gzip
import os
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import KUBERAY, ROOT, VALUES, documents, misspelt, name, objects, of_kind, walk

CRDS = Path(os.environ.get("RAYBERT_KUBERAY_CRDS") or ROOT.parent / "shared/data/kuberay")
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
#: Of the Gateway API and of Prometheus' operator, whose schemas are not here: see test_names.py.
OTHER_KINDS = ("GatewayClass", "Gateway", "HTTPRoute", "PodMonitor", "PrometheusRule")
LATEST = kubernetes_validate.latest_version()


def strict(schema):
    """A CRD's schema as Draft 7, closed to keys that the API server would drop without a word."""
    made = dict(schema)
    if "properties" in schema:
        made["properties"] = {key: strict(part) for key, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    return made


@pytest.fixture(scope="module")
def ray_schemas():
    """The validator of each kind of KubeRay's that we use."""
    made = {}
    for kind in RAY_KINDS:
        path = CRDS / f"ray.io_{kind.lower()}s.yaml.gz"
        if not path.exists():
            pytest.skip(f"no {path}; RAYBERT_KUBERAY_CRDS names the folder of KubeRay's CRDs")
        crd = yaml.load(gzip.decompress(path.read_bytes()), Loader=yaml.CSafeLoader)
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
        made[kind] = jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))
    return made


def ray_object(kind, file=None):
    (found,) = (document for path, document in of_kind(kind) if file in (None, path))
    return found


def pods():
    """Yield every pod template's spec, as (file, spec)."""
    for file, tree in objects():
        for path, value in walk(tree):
            if path and path[-1] in ("template", "submitterPodTemplate"):
                yield file, value["spec"]


def containers():
    for file, spec in pods():
        for container in spec["containers"]:
            yield file, container


# Schemas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KUBERAY, ids=name)
def test_ray_objects_are_what_the_crds_say(path, ray_schemas):
    for document in documents(path):
        if document["kind"] in RAY_KINDS:
            errors = ray_schemas[document["kind"]].iter_errors(document)
            assert [error.message for error in errors] == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayCluster", "spec.rayVersion"),
        ("RayCluster", "spec.authOptions.secretName"),
        ("RayCluster", "spec.headGroupSpec.rayStartParams"),
        ("RayCluster", "spec.workerGroupSpecs.0.maxReplicas"),
        ("RayCluster", "spec.workerGroupSpecs.1.template.spec.containers.0.resources.limits"),
        ("RayCluster", "spec.gcsFaultToleranceOptions.redisPassword.valueFrom"),
        ("RayJob", "spec.backoffLimit"),
        ("RayJob", "spec.deletionStrategy.deletionRules.0.condition.ttlSeconds"),
        ("RayJob", "spec.submitterPodTemplate.spec.restartPolicy"),
        ("RayJob", "spec.rayClusterSpec.autoscalerOptions.version"),
        ("RayService", "spec.serveConfigV2"),
        ("RayService", "spec.upgradeStrategy.type"),
        (
            "RayService",
            "spec.rayClusterConfig.headGroupSpec.template.spec.volumes.0.emptyDir.medium",
        ),
    ],
)
def test_a_misspelt_key_of_kuberay_is_refused(kind, path, ray_schemas):
    good = of_kind(kind)[0][1]
    bad = misspelt(good, path)
    assert ray_schemas[kind].is_valid(good)
    assert not ray_schemas[kind].is_valid(bad)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("RayCluster", "spec.authOptions.mode", "tokens"),
        ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", "one"),
        ("RayJob", "spec.deletionStrategy.deletionRules.0.policy", "Delete"),
    ],
)
def test_a_wrong_value_of_kuberay_is_refused(kind, key, value, ray_schemas):
    tree = copy.deepcopy(of_kind(kind)[0][1])
    *parents, last = key.split(".")
    parent = tree
    for part in parents:
        parent = parent[int(part) if part.isdigit() else part]
    parent[last] = value
    assert not ray_schemas[kind].is_valid(tree)


@pytest.mark.parametrize("path", KUBERAY, ids=name)
def test_core_objects_are_what_kubernetes_says(path):
    for document in documents(path):
        if document["kind"] not in (*RAY_KINDS, *OTHER_KINDS):
            kubernetes_validate.validate(document, LATEST, strict=True)


def test_pods_are_what_kubernetes_says():
    """Also where KubeRay's CRDs are absent: they embed the same pods."""
    for _, spec in pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, LATEST, strict=True)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Namespace", "metadata.name"),
        ("PersistentVolumeClaim", "spec.resources"),
        ("Deployment", "spec.template.spec.containers.0.image"),
        ("Service", "spec.ports.0.port"),
        ("NetworkPolicy", "spec.ingress.0.from"),
        ("ConfigMap", "data"),
    ],
)
def test_a_misspelt_key_of_a_core_object_is_refused(kind, path):
    good = of_kind(kind)[0][1]
    kubernetes_validate.validate(good, LATEST, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt(good, path), LATEST, strict=True)


def test_every_kind_is_validated():
    core = {"Namespace", "PersistentVolumeClaim", "Deployment", "Service", "NetworkPolicy"}
    expected = {*core, "ConfigMap", *RAY_KINDS, *OTHER_KINDS}
    assert {tree["kind"] for _, tree in objects()} == expected


# What KubeRay's operator refuses beyond the schema -----------------------------------------------


def clusters():
    for file, tree in objects():
        for path, value in walk(tree):
            if isinstance(value, dict) and "headGroupSpec" in value:
                yield ".".join([file, *map(str, path)]), value


def test_there_are_five_clusters():
    assert len(list(clusters())) == 5


@pytest.mark.parametrize(("where", "cluster"), list(clusters()))
def test_a_cluster_asks_for_its_token_and_scales(where, cluster):
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == VALUES["ray_version"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        assert "restartPolicy" not in group["template"]["spec"]  # the second autoscaler sets it


def test_who_survives_a_head():
    kept = {where for where, cluster in clusters() if "gcsFaultToleranceOptions" in cluster}
    assert kept == {
        "kuberay/raycluster.yaml.spec",
        "kuberay/rayservice.yaml.spec.rayClusterConfig",
        "kuberay/rayservice-gateway.yaml.spec.rayClusterConfig",
    }


@pytest.mark.parametrize(("file", "job"), of_kind("RayJob"))
def test_a_jobs_cluster_is_deleted_by_rules_that_the_operator_takes(file, job):
    spec = job["spec"]
    rules = spec["deletionStrategy"]["deletionRules"]
    assert "shutdownAfterJobFinishes" not in spec
    assert {tuple(rule["condition"].items())[0] for rule in rules} == {
        ("jobStatus", "SUCCEEDED"),
        ("jobStatus", "FAILED"),
        ("jobDeploymentStatus", "Failed"),
    }
    assert {rule["policy"] for rule in rules} == {"DeleteCluster"}  # with an autoscaler: no other
    config = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][-1]
    assert config["configMap"]["name"] in {m["metadata"]["name"] for _, m in of_kind("ConfigMap")}


def test_an_upgrade_goes_in_steps_that_the_operator_takes():
    service = ray_object("RayService", "kuberay/rayservice-gateway.yaml")
    options = service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100


# Laws --------------------------------------------------------------------------------------------


def test_requests_equal_limits():
    seen = 0
    for file, tree in objects():
        for path, value in walk(tree):
            if path and path[-1] == "resources" and "PersistentVolumeClaim" != tree["kind"]:
                assert value["requests"] == value["limits"], (file, path)
                seen += 1
    assert seen > len(list(containers()))  # and the autoscalers
    assert all("resources" in container for _, container in containers())


def test_a_ray_pod_fills_a_node_alone():
    for _, cluster in clusters():
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for spec in (group["template"]["spec"] for group in groups):
            (term,) = spec["affinity"]["podAntiAffinity"][
                "requiredDuringSchedulingIgnoredDuringExecution"
            ]
            assert term["topologyKey"] == "kubernetes.io/hostname"
            assert term["labelSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
            shm = spec["volumes"][0]["emptyDir"]
            assert shm["medium"] == "Memory" and "sizeLimit" in shm
            mounts = {m["name"]: m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
            assert mounts["shm"] == "/dev/shm"
            assert set(mounts) == {volume["name"] for volume in spec["volumes"]}


def test_a_checkpoint_has_the_time_that_a_pod_is_given():
    """Ray's own 30 seconds end before Kubernetes' patience, unless it is told of it."""
    from ray._private import ray_constants

    variable = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, variable)
    for _, cluster in clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            spec = group["template"]["spec"]
            environment = {e["name"]: e["value"] for e in spec["containers"][0]["env"]}
            left = spec["terminationGracePeriodSeconds"] - float(environment[variable])
            assert spec["terminationGracePeriodSeconds"] == VALUES["grace_seconds"]
            assert 10 <= left <= 30


def test_gpu_workers_have_gpus_and_their_image():
    for _, cluster in clusters():
        for group in cluster["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            has = "nvidia.com/gpu" in container["resources"]["limits"]
            assert has == (group["groupName"] == "gpu")
            assert container["image"] == VALUES["images"]["cuda" if has else "cpu"]


def test_nobody_is_root():
    for file, spec in pods():
        assert spec["securityContext"]["runAsNonRoot"] is True, file
        assert spec["securityContext"]["runAsUser"] > 0
    for file, container in containers():
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, file
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_nothing_is_open_to_the_world():
    for file, tree in objects():
        for path, value in walk(tree):
            key = path[-1] if path else None
            assert key not in ("hostPort", "hostNetwork", "hostPath", "nodePort"), (file, path)
            assert value not in ("LoadBalancer", "NodePort"), (file, path)


def test_no_secret_is_in_a_file():
    """They are named; their contents are made by whoever runs them."""
    assert of_kind("Secret") == []
    for file, container in containers():
        for variable in container.get("env", []):
            if any(word in variable["name"] for word in ("TOKEN", "PASSWORD", "KEY")):
                assert set(variable) == {"name", "valueFrom"}, (file, variable["name"])


def test_what_is_referred_to_is_there():
    """Claims are made by base.yaml; Secrets are those that the README makes."""
    claims = {claim["metadata"]["name"] for _, claim in of_kind("PersistentVolumeClaim")}
    readme = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    named = set()
    for _, tree in objects():
        for path, value in walk(tree):
            if path and path[-1] == "claimName":
                assert value in claims
            if path and path[-1] == "secretName":
                named.add(value)
            if path and path[-1] == "secretKeyRef":
                named.add(value["name"])
            if path and path[-1] == "certificateRefs":
                named |= {reference["name"] for reference in value}
    assert named == set(VALUES["secrets"].values())
    assert all(re.search(f"create secret (generic|tls) {name} ", readme) for name in named)


def test_everything_lives_in_one_namespace():
    """But what Istio reads for a class of Gateways."""
    for file, tree in objects():
        metadata = tree["metadata"]
        if metadata["name"] == VALUES["gateway"]["class"]:
            assert metadata.get("namespace", "istio-system") == VALUES["gateway"]["namespace"]
            continue
        where = metadata["name"] if tree["kind"] == "Namespace" else metadata["namespace"]
        assert where == VALUES["namespace"], file


# Who may come in ---------------------------------------------------------------------------------

PROMETHEUS, OPERATOR, SUBMITTER, RAY, ANYONE = "prometheus operator submitter ray anyone".split()
PEERS = {"prometheus": PROMETHEUS, "kuberay-operator": OPERATOR, "RayJob": SUBMITTER, "yes": RAY}


def who(peer):
    if "namespaceSelector" in peer:  # alone, it would let in whoever took the label
        assert set(peer) == {"namespaceSelector", "podSelector"}
    (label,) = peer["podSelector"]["matchLabels"].values()
    return PEERS[label]


def guests_of(policy, port):
    """Who reaches a port of the pods that a policy protects."""
    found = set()
    for rule in policy["spec"]["ingress"]:
        if port in [entry["port"] for entry in rule.get("ports", [{"port": port}])]:
            found |= {who(peer) for peer in rule["from"]} if "from" in rule else {ANYONE}
    return found


def test_the_network_policy_lets_in_whom_it_says():
    policies = {p["metadata"]["name"]: p for _, p in of_kind("NetworkPolicy")}
    ray, redis, ports = policies["raybert-ray"], policies["raybert-redis"], VALUES["ports"]
    assert ray["spec"]["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    for metrics in ("metrics", "autoscaler_metrics", "dashboard_metrics", "haproxy_metrics"):
        assert guests_of(ray, ports[metrics]) == {RAY, PROMETHEUS}, metrics
    assert guests_of(ray, 8404) == {RAY}  # HAProxy's statistics
    assert guests_of(ray, ports["gcs"]) == {RAY}
    assert guests_of(ray, 10001) == {RAY}  # Ray's client
    assert guests_of(ray, ports["dashboard"]) == {RAY, OPERATOR, SUBMITTER}
    assert guests_of(ray, ports["serve"]) == {RAY, ANYONE}
    assert guests_of(redis, ports["redis"]) == {RAY}
    assert guests_of(redis, 1) == set()
    assert all(p["spec"]["policyTypes"] == ["Ingress"] for p in policies.values())


def test_the_ports_are_those_that_ray_takes():
    from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
    from ray.dashboard.consts import DASHBOARD_METRIC_PORT
    from ray.serve._private.constants import RAY_SERVE_HAPROXY_METRICS_PORT

    ports = VALUES["ports"]
    assert ports["autoscaler_metrics"] == AUTOSCALER_METRIC_PORT
    assert ports["dashboard_metrics"] == DASHBOARD_METRIC_PORT
    assert ports["haproxy_metrics"] == RAY_SERVE_HAPROXY_METRICS_PORT
