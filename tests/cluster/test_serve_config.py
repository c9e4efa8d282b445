"""Serve's configuration: Serve's own schema, and the unknown keys that it lets pass."""

import importlib
import importlib.util
import typing

import pydantic
import pytest
import yaml
from manifests import SERVE, VALUES, documents, misspelt, of_kind

CONFIG = documents(SERVE)[0]
(SERVICE,) = (service for _, service in of_kind("RayService"))
IN_SERVICE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])


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


def check(config):
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)
    assert list(unknown(ServeDeploySchema, config)) == []


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
        "applications.0.deployments.0.ray_actor_options",
        "applications.0.deployments.0.ray_actor_options.num_cpus",
        "applications.0.deployments.0.autoscaling_config.max_replicas",
    ],
)
def test_a_misspelt_key_is_refused(path):
    with pytest.raises((pydantic.ValidationError, AssertionError)):
        check(misspelt(CONFIG, path))


def test_a_wrong_value_is_refused():
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["applications"][0]["deployments"][0]["ray_actor_options"]["num_cpus"] = -1
    with pytest.raises(pydantic.ValidationError):
        check(config)


def test_both_serve_one_application():
    assert CONFIG["applications"] == IN_SERVICE["applications"]


def test_who_is_answered_from_outside_brings_a_key():
    """On 127.0.0.1 it is this machine's user; else the application is told where the keys are."""
    assert CONFIG["http_options"]["host"] == "127.0.0.1"
    assert IN_SERVICE["http_options"] == {"host": "0.0.0.0", "port": VALUES["ports"]["serve"]}
    (application,) = IN_SERVICE["applications"]
    keys = application["args"]["keys"]
    cluster = SERVICE["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        assert keys.startswith(mounts["keys"] + "/")


def test_what_is_set_before_ray_starts_is_what_serve_reads():
    from ray._private import ray_constants
    from ray.serve._private import constants

    cluster = SERVICE["spec"]["rayClusterConfig"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    environments = [group["template"]["spec"]["containers"][0]["env"] for group in groups]
    assert all(environment == environments[0] for environment in environments)
    names = [variable["name"] for variable in environments[0]]
    assert "RAY_SERVE_ENABLE_HA_PROXY" in names
    read = {*vars(constants), *vars(ray_constants)}
    assert [name for name in names if name not in read] == []


def test_the_builder_is_there_once_there_is_an_app():
    module, _, builder = CONFIG["applications"][0]["import_path"].partition(":")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not built yet")
    assert callable(getattr(importlib.import_module(module), builder))
