"""The client with real sockets: which requests it retries, and after which pause."""

import json
import socket
import ssl
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from certificates import certificate

from raybert.serve import client as module
from raybert.serve.client import (
    Client,
    NoAnswer,
    RequestRejected,
    ServerError,
    ServerUnavailable,
)

ANSWER = [{"label": "pos", "score": 0.9}]


@contextmanager
def server(*script, context=None):
    """A server that answers by a script; `asked` has the requests.

    Each item of the script is a status, (status, headers), or None: the connection is cut.
    """
    asked, left = [], list(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):  # noqa: N802 - so the library calls it
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(body), dict(self.headers)))
            now = left.pop(0) if left else 200
            if now is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            status, headers = now if isinstance(now, tuple) else (now, {})
            answer = ANSWER if status == 200 else {"error": f"status {status}", "error_type": "x"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    if context is not None:
        made.socket = context.wrap_socket(made.socket, server_side=True)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", asked
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """The pauses of the client, which are not waited for."""
    made = []
    monkeypatch.setattr(module.time, "sleep", made.append)
    return made


def test_requests_are_sent_with_key_and_options():
    with server() as (url, asked), Client(url, key="k" * 20) as client:
        assert client.predict(("one", "two"), truncate=True) == ANSWER
        assert client.fill_mask("a [MASK]", top_k=3) == ANSWER
        client.predict([("a", "b"), ["c", "d"]], model="pairs", threshold=0.0, explain=False)
        with pytest.raises(TypeError, match="truncat"):
            client.predict("one", truncat=True)
    (path, body, headers), (other, masked, _), (_, pairs, _) = asked
    assert (path, body) == ("/predict", {"inputs": ["one", "two"], "truncate": True})
    assert (other, masked) == ("/fill-mask", {"inputs": "a [MASK]", "top_k": 3})
    assert headers["Authorization"] == "Bearer " + "k" * 20
    assert pairs.pop("inputs") == [["a", "b"], ["c", "d"]]
    assert pairs == {"model": "pairs", "threshold": 0.0, "explain": False}


def test_a_transport_replaces_the_connection(pauses):
    answers = [(503, {"Retry-After": "2"}, b""), (200, {}, b'["x"]'), (200, {}, b"<html>")]
    sent = []

    def transport(*request):
        sent.append(request)
        return answers.pop(0)

    with Client("http://a/root/", "key", transport=transport) as client:
        assert client.predict("a") == ["x"]
        assert pauses == [2]
        with pytest.raises(RequestRejected, match="^200: the response is not JSON$"):
            client.info()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
    assert sent[1] == ("POST", "/root/predict", headers, b'{"inputs": "a"}')
    assert sent[2] == ("GET", "/root/info", headers, None)


def test_patience_s_is_the_deprecated_name_of_retry_timeout_s():
    with pytest.warns(DeprecationWarning, match="patience_s is now retry_timeout_s"):
        client = Client(patience_s=0, transport=lambda *request: (503, {}, b'{"error": "full"}'))
    with pytest.raises(ServerUnavailable) as error:
        client.info()
    assert (error.value.status, error.value.message) == (503, "full")


def test_lost_and_temporarily_rejected_requests_are_retried(pauses):
    script = [None, 429, 503, None, (500, {}), 200]
    with server(*script) as (url, asked), Client(url) as client:
        assert client.predict("a") == ANSWER
    assert len(asked) == 6
    assert len(pauses) == 5


def test_the_pause_is_that_of_retry_after(pauses):
    with server((429, {"Retry-After": "3"})) as (url, _), Client(url) as client:
        client.predict("a")
    assert len(pauses) == 1 and pauses[0] == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 424])
def test_permanent_errors_are_raised_at_once(pauses, status):
    with server(status) as (url, asked), Client(url) as client:
        with pytest.raises(RequestRejected, match=f"^{status}: status {status}$") as error:
            client.predict("a")
    assert error.value.status == status
    assert (len(asked), pauses) == (1, [])


def test_a_request_that_timed_out_is_sent_once_more(pauses):
    with server(504, 503, 504, 200) as (url, asked), Client(url) as client:
        with pytest.raises(ServerUnavailable, match="^504: "):
            client.predict("a")
        assert (len(asked), len(pauses)) == (3, 2)
        assert client.predict("a") == ANSWER
    with server(504, 200) as (url, asked), Client(url) as client:
        assert client.predict("a") == ANSWER


@pytest.mark.parametrize(
    ("code", "tries"), [(socket.EAI_NONAME, 1), (socket.EAI_FAIL, 1), (socket.EAI_AGAIN, 3)]
)
def test_an_unknown_host_is_raised_at_once(pauses, monkeypatch, code, tries):
    looked = []

    def unknown(*arguments, **options):
        looked.append(arguments)
        raise socket.gaierror(code if len(looked) < 3 else socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with Client("http://a-host.example") as client:
        with pytest.raises(NoAnswer, match="no answer: .*unknown") as error:
            client.predict("a")
    assert (error.value.status, type(error.value.__cause__)) == (0, socket.gaierror)
    assert issubclass(NoAnswer, ServerError)
    assert (len(looked), len(pauses)) == (tries, tries - 1)


def test_an_invalid_certificate_is_raised_at_once(pauses, tmp_path):
    files = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    with server(context=context) as (url, asked):
        with Client(url.replace("http:", "https:")) as untrusting:
            with pytest.raises(NoAnswer, match="certificate verify failed"):
                untrusting.predict("a")
        assert (asked, pauses) == ([], [])
        trusting = ssl.create_default_context(cafile=files[0])
        with Client(url.replace("http:", "https:"), context=trusting) as client:
            assert client.predict("a") == ANSWER


def test_retries_end_after_the_time_out():
    with socket.socket() as probe:  # a port where nobody listens
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with Client(url, retry_timeout_s=0.3) as client:
        with pytest.raises(ServerError, match="no answer: "):
            client.predict("a")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", ""])
def test_an_invalid_url_is_rejected(url):
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        Client(url)


def test_a_key_is_never_shown_nor_sent_with_a_line_break():
    assert Client(key="abc\n")._headers["Authorization"] == "Bearer abc"
    for key in ("secret\nX-Injected: 1", "secret key", "secret\x00", "sécret"):
        with pytest.raises(ValueError, match="key: it has other characters") as error:
            Client(key=key)
        assert "cret" not in str(error.value)
