"""The cluster launcher's files, through what `ray up` does with them before it starts anything."""

import shlex
import socket

import click
import jsonschema
import pytest
from manifests import LAUNCHER, documents, misspelt, name
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start


def launched(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def config_of(file):
    (path,) = (path for path in LAUNCHER if path.stem == file)
    return documents(path)[0]


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_the_launcher_takes_it(path):
    prepared = launched(documents(path)[0])
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("aws", "max_workers"),
        ("aws", "docker.run_options"),
        ("aws", "auth.ssh_user"),
        ("aws", "available_node_types.gpu.min_workers"),
        ("aws", "available_node_types.gpu.docker.worker_image"),
        ("onpremises", "file_mounts"),
        ("onpremises", "docker.run_options"),
        ("onpremises", "provider.head_ip"),
    ],
)
def test_a_misspelt_key_is_refused(file, path):
    with pytest.raises((jsonschema.ValidationError, click.ClickException)):
        launched(misspelt(config_of(file), path))


def start_commands(config):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            words = shlex.split(command)
            if words[:2] == ["ray", "start"]:
                yield key, words[2:]


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_ray_is_started_with_options_that_it_has_and_a_dashboard_that_stays_inside(path):
    seen = []
    for key, words in start_commands(documents(path)[0]):
        options = start.make_context("start", words).params
        seen.append(key)
        assert options["head"] == key.startswith("head")
        if options["head"]:
            assert options["dashboard_host"] == "127.0.0.1"
    assert seen == ["head_start_ray_commands", "worker_start_ray_commands"]
    with pytest.raises(click.NoSuchOption):
        start.make_context("start", ["--heads"])


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_every_node_gets_the_token(path):
    assert documents(path)[0]["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_nobodys_machines_are_named():
    """The addresses are those that RFC 5737 keeps for documents."""
    provider = config_of("onpremises")["provider"]
    for address in (provider["head_ip"], *provider["worker_ips"]):
        assert socket.inet_aton(address)[:3] == bytes([192, 0, 2])


def test_aws_starts_at_most_what_its_kinds_allow():
    config = config_of("aws")
    kinds = config["available_node_types"].values()
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in kinds)
