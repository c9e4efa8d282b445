"""Names: those that KubeRay and Istio derive from ours meet no other object's."""

import re

import pytest
from manifests import README, VALUES, changed, objects, of_kind

ANY = r"-[a-z0-9]{5}"  # what KubeRay adds to the name of a cluster that it makes
NAMESPACE = VALUES["namespace"]


def of_cluster(name):
    """What the operator makes for a RayCluster; `name` is a pattern."""
    yield "Service", f"{name}-head-svc"
    yield "Service", f"{name}-headless"
    for kind in ("ServiceAccount", "Role", "RoleBinding"):  # of its autoscaler
        yield kind, name


def derived(tree):
    """Yield (kind, pattern of the name) of an object and of all that is made for it."""
    kind, name = tree["kind"], re.escape(tree["metadata"]["name"])
    yield kind, name
    if kind == "RayCluster":
        yield from of_cluster(name)
    if kind == "RayJob":
        yield "Job", name
        yield "RayCluster", name + ANY
        yield from of_cluster(name + ANY)
    if kind == "RayService":
        yield "Service", f"{name}-head-svc"
        yield "Service", f"{name}-serve-svc"
        yield "RayCluster", name + ANY
        yield from of_cluster(name + ANY)
        yield "Service", f"{name}{ANY}-serve-svc"
        if "clusterUpgradeOptions" in tree["spec"]["upgradeStrategy"]:
            yield "HTTPRoute", f"{name}-httproute"
            yield "Gateway", f"{name}-gateway"
            yield "Service", f"{name}-gateway-{re.escape(VALUES['gateway']['class'])}"
    if kind == "Gateway":
        yield "Service", f"{name}-{re.escape(tree['spec']['gatewayClassName'])}"


def example(pattern):
    """A name that fits a pattern."""
    return pattern.replace(ANY, "-x7k2q").replace("\\", "")


def collisions(trees):
    """The (kind, name) pairs that two objects would have."""
    made = [(index, *found) for index, tree in enumerate(trees) for found in derived(tree)]
    return {
        (kind, example(pattern))
        for index, kind, pattern in made
        for other, other_kind, other_pattern in made
        if index != other and kind == other_kind
        and re.fullmatch(other_pattern, example(pattern))
    }  # fmt: skip


def test_no_derived_name_is_anothers():
    assert collisions([tree for _, tree in objects()]) == set()


@pytest.mark.parametrize(
    ("kind", "name", "meets"),
    [
        ("RayService", "raybert", ("Service", "raybert-head-svc")),
        ("RayService", "raybert-gradual", ("Service", "raybert-gradual-serve-svc")),
        ("RayCluster", "raybert-classifier-x7k2q", ("RayCluster", "raybert-classifier-x7k2q")),
        ("RayJob", "raybert-tune", ("Job", "raybert-tune")),
        ("Gateway", "raybert-gradual-gateway", ("Gateway", "raybert-gradual-gateway")),
    ],
)
def test_a_derived_name_that_is_anothers_is_found(kind, name, meets):
    trees = [tree for _, tree in objects()]
    first = next(tree for tree in trees if tree["kind"] == kind)
    renamed = changed(first, ("metadata", "name"), lambda parent, key: parent.update({key: name}))
    assert meets in collisions([*trees, renamed])


def test_names_are_short_enough_for_what_is_added():
    for _, tree in objects():
        for kind, pattern in derived(tree):
            assert len(example(pattern)) <= (63 if kind != "RayCluster" else 50), pattern


def test_submit_reaches_the_cluster_and_clients_the_service():
    """Each address that the README names is derived from one object of the right kind."""
    (cluster,) = {tree["metadata"]["name"] for _, tree in of_kind("RayCluster")}
    text = README.read_text(encoding="utf-8")
    assert f"service/{cluster}-head-svc 8265" in text
    made = {example(p) for _, tree in objects() for kind, p in derived(tree) if kind == "Service"}
    named = set(re.findall(r"\braybert-[a-z-]+?-(?:svc|internal)\b", text))
    assert len(named) == 3 and named <= made


def test_the_gateway_is_in_front_of_the_one_that_kuberay_makes():
    entry = next(tree for _, tree in of_kind("HTTPRoute"))
    (backend,) = entry["spec"]["rules"][0]["backendRefs"]
    (service,) = (s for _, s in of_kind("RayService")
                  if "clusterUpgradeOptions" in s["spec"]["upgradeStrategy"])  # fmt: skip
    assert ("Service", backend["name"]) in {(k, example(p)) for k, p in derived(service)}
    assert backend["port"] == 80
    (gateway,) = (tree for _, tree in of_kind("Gateway"))
    assert entry["spec"]["parentRefs"][0]["name"] == gateway["metadata"]["name"]
    (listener,) = gateway["spec"]["listeners"]
    assert (listener["protocol"], listener["tls"]["mode"]) == ("HTTPS", "Terminate")


def test_no_gateway_has_a_public_address():
    """Istio makes a load balancer for each, unless the class says otherwise."""
    (of_class,) = (tree for _, tree in of_kind("GatewayClass"))
    name = of_class["metadata"]["name"]
    (defaults,) = (tree for _, tree in of_kind("ConfigMap") if "labels" in tree["metadata"])
    assert defaults["metadata"]["labels"] == {"gateway.istio.io/defaults-for-class": name}
    assert "type: ClusterIP" in defaults["data"]["service"]
    classes = {tree["spec"]["gatewayClassName"] for _, tree in of_kind("Gateway")}
    for _, service in of_kind("RayService"):
        options = service["spec"]["upgradeStrategy"].get("clusterUpgradeOptions")
        classes |= {options["gatewayClassName"]} if options else set()
    assert classes == {name}


def test_the_plain_service_needs_nothing_but_kuberay():
    kinds = {tree["kind"] for file, tree in objects() if file == "kuberay/rayservice.yaml"}
    assert kinds == {"RayService"}
    (plain,) = (t for file, t in of_kind("RayService") if file == "kuberay/rayservice.yaml")
    assert plain["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_the_pods_have_the_ports_that_are_scraped():
    (monitor,) = (tree for _, tree in of_kind("PodMonitor"))
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    (service,) = (t for file, t in of_kind("RayService") if file == "kuberay/rayservice.yaml")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in head["containers"][0]["ports"]}
    assert scraped <= ports.keys()
    known = VALUES["ports"]
    assert {ports[name] for name in scraped} == {
        known["metrics"],
        known["autoscaler_metrics"],
        known["dashboard_metrics"],
        known["haproxy_metrics"],
    }
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}


def test_commands_that_install_name_their_versions():
    text = README.read_text(encoding="utf-8")
    for command in re.findall(r"^ *helm install .*", text, re.M):
        assert re.search(r" --version (\S+)", command)[1] in VALUES["versions"].values()
    for version in VALUES["versions"].values():
        assert version in text
