"""What `serve deploy` is told before it has deployed anything; Ray is not started."""

import logging

import pytest

from raybert.errors import ConfigError
from raybert.serve.deploy import deployment
from raybert.serve.settings import ServeConfig


@pytest.fixture
def cluster(monkeypatch):
    """A Ray that is said to run, with what is put into it."""
    resources = {}
    monkeypatch.setattr(deployment.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(deployment.ray, "cluster_resources", lambda: resources)
    return resources


@pytest.mark.parametrize(
    ("settings", "resources", "lacks"),
    [
        ({"replicas": 2, "cpus": 2}, {"CPU": 6}, None),
        ({"replicas": 2, "cpus": 2}, {"CPU": 5}, "CPU 6, it has 5"),
        ({"replicas": 8, "cpus": 1}, {"CPU": 9}, "CPU 10, it has 9"),  # a quarter of them
        ({"replicas": 1}, {"CPU": 8, "GPU": 1}, "GPU 2, it has 1"),
        ({"replicas": 1, "gpus": 0.5}, {"CPU": 8, "GPU": 1}, None),
        ({"replicas": {"min": 1, "max": 8}, "cpus": 2}, {"CPU": 4}, None),
        ({"replicas": {"min": 3, "max": 8}, "cpus": 2}, {"CPU": 4}, "CPU 8, it has 4"),
        ({"replicas": 2, "cpus": 2, "surge_percent": 0}, {"CPU": 4}, None),
    ],
)
def test_a_cluster_without_room_for_an_update_is_told_of(cluster, settings, resources, lacks):
    cluster |= resources
    found = deployment.lacking_for_updates(ServeConfig.model_validate(settings))
    assert (found is None) if lacks is None else (lacks in found and "\n" not in found)


def test_what_an_update_lacks_is_told_when_it_is_deployed(model, cluster, monkeypatch, caplog):
    cluster |= {"CPU": 1}
    monkeypatch.setattr(deployment, "_listening_on", lambda: "127.0.0.1")
    monkeypatch.setattr(deployment, "application", lambda config, digests: config)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    deployment.build({"model": model.uri})
    assert "serve.surge_percent=25" in caplog.text
    caplog.clear()
    deployment.build({"model": model.uri, "surge_percent": 0})
    assert caplog.text == ""


@pytest.mark.parametrize(
    "args",
    [
        {"model": "reviews"},
        {"model": "{model}", "models": {"a": "reviews"}},
        {"model": "{model}", "canary": {"model": "reviews"}},
    ],
)
def test_a_name_asks_for_a_registry(model, args):
    """The command line looks into its experiment's storage; args have no experiment."""
    told = {key: model.uri if value == "{model}" else value for key, value in args.items()}
    with pytest.raises(ConfigError, match="args.registry=null: reviews is no folder here") as error:
        deployment.build(told)
    assert "\n" not in str(error.value)
