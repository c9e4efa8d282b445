"""What `serve deploy` checks before it deploys anything; Ray is not started."""

import logging

import pytest

from raybert.errors import ConfigError
from raybert.serve.deploy import deployment
from raybert.serve.http.middleware import LoadSheddingMiddleware
from raybert.serve.settings import ServeConfig


@pytest.fixture
def cluster(monkeypatch):
    """A fake Ray with these resources."""
    resources = {}
    monkeypatch.setattr(deployment.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(deployment.ray, "cluster_resources", lambda: resources)
    return resources


@pytest.mark.parametrize(
    ("settings", "resources", "shortage"),
    [
        ({"replicas": 2, "cpus": 2}, {"CPU": 6}, None),
        ({"replicas": 2, "cpus": 2}, {"CPU": 5}, "CPU 6, but this cluster has 5"),
        (
            {"replicas": 8, "cpus": 1},
            {"CPU": 9},
            "CPU 10, but this cluster has 9",
        ),  # a quarter of them
        ({"replicas": 1}, {"CPU": 8, "GPU": 1}, "GPU 2, but this cluster has 1"),
        ({"replicas": 1, "gpus": 0.5}, {"CPU": 8, "GPU": 1}, None),
        ({"replicas": {"min": 1, "max": 8}, "cpus": 2}, {"CPU": 4}, None),
        (
            {"replicas": {"min": 3, "max": 8}, "cpus": 2},
            {"CPU": 4},
            "CPU 8, but this cluster has 4",
        ),
        ({"replicas": 2, "cpus": 2, "surge_percent": 0}, {"CPU": 4}, None),
    ],
)
def test_a_cluster_without_room_for_an_update_is_reported(cluster, settings, resources, shortage):
    cluster |= resources
    found = deployment.find_update_shortage(ServeConfig.model_validate(settings))
    assert (found is None) if shortage is None else (shortage in found and "\n" not in found)


def test_resources_that_an_update_lacks_are_logged_at_deployment(
    model, cluster, monkeypatch, caplog
):
    cluster |= {"CPU": 1}
    monkeypatch.setattr(deployment, "_serve_host", lambda: "127.0.0.1")
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
def test_a_name_requires_a_registry(model, args):
    """The command line uses its experiment's storage; args have no experiment."""
    given = {key: model.uri if value == "{model}" else value for key, value in args.items()}
    with pytest.raises(ConfigError, match="args.registry=null: reviews is no folder here") as error:
        deployment.build(given)
    assert "\n" not in str(error.value)


def test_former_addresses_in_serve_configurations_can_be_imported():
    from raybert.serve import app, edge

    assert app.build is deployment.build
    assert [middleware.cls for middleware in edge.middlewares()] == [LoadSheddingMiddleware]
