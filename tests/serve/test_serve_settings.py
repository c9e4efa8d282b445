"""The `serve` section: an invalid value is an error that names its key and a remedy."""

import pytest

from raybert.config import build
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.serve.settings import ServeConfig, is_loopback


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tls_cert": "a.pem"}, "tls_key=null: TLS needs both"),
        ({"tls_key": "a.pem"}, "tls_cert=null: TLS needs both"),
        ({"tls_cert": "a", "tls_key": "b", "ingress": "haproxy"}, "ingress=haproxy speaks no TLS"),
        ({"replicas": 0}, "serve.replicas"),
        (
            {"replicas": {"min": 3, "max": 2}},
            "serve.replicas.min=3 is more than",
        ),
        ({"canary": {"share": 0.1}}, "serve.canary.model is missing"),
        ({"canary": {"model": "a", "share": 1.0}}, "serve.canary.share"),
        ({"prt": 80}, "unknown key serve.prt; did you mean serve.port"),
        ({"precision": "fp8"}, "serve.precision"),
    ],
)
def test_invalid_values_are_rejected(values, words):
    with pytest.raises(ConfigError) as error:
        build(Experiment, {"serve": values}, "test")
    assert words in str(error.value)


def test_an_invalid_option_is_named_by_its_key():
    with pytest.raises(ConfigError, match="^serve.port=70000: input should be less than"):
        ServeConfig().changed({"port": 70000}, model="runs/a", registry="runs")


def test_replicas_are_a_number_or_a_range():
    assert build(ServeConfig, {"replicas": 3}, "test").max_replicas == 3
    assert build(ServeConfig, {"replicas": {"max": 5}}, "test").max_replicas == 5


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("example.com", False),
    ],
)
def test_which_hosts_only_this_machine_reaches(host, loopback):
    assert is_loopback(host) is loopback


def test_options_change_settings_and_nulls_are_filled_in():
    config = ServeConfig().changed({"port": 9000}, model="runs/a", registry="runs")
    assert (config.port, config.model, config.registry) == (9000, "runs/a", "runs")
    config = ServeConfig(fill_mask="mlm").changed({}, model="runs/a", registry="runs")
    assert config.model is None
    with pytest.raises(ConfigError, match="port=0"):
        ServeConfig().changed({"port": 0}, model="a", registry="b")
