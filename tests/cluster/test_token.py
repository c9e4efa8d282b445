"""Ray's token: Ray finds the one that we write, and no other user can read it."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from raybert.cluster import token


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path):
    return path.stat().st_mode & 0o777


_FOUND = """
from ray._raylet import AuthenticationTokenLoader
print(AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True))
"""


def test_ray_finds_the_token_that_we_write(home):
    token.make_token()
    path = home / ".ray" / "auth_token"
    made = path.read_text()
    assert mode(path) == 0o600
    assert len(made) == 64
    assert os.listdir(path.parent) == ["auth_token"]
    found = subprocess.run(
        [sys.executable, "-c", _FOUND], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == made
    token.make_token()
    assert path.read_text() == made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAY_AUTH_MODE", "disabled"),
        ("RAY_AUTH_TOKEN", "secret"),
        ("RAY_AUTH_TOKEN_PATH", "/elsewhere"),
    ],
)
def test_no_token_is_written_where_ray_would_write_none(home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    token.make_token()
    assert os.listdir(home) == []


def test_of_many_processes_one_writes_the_token(home):
    together = threading.Barrier(8)
    seen = []

    def make():
        together.wait()
        token.make_token()
        seen.append((home / ".ray" / "auth_token").read_text())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert os.listdir(home / ".ray") == ["auth_token"]


def test_a_home_that_can_not_be_written_is_left_to_ray(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("HOME", str(home / "file"))
    token.make_token()
    assert token.close_token() == "none"


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_token_that_others_can_read_is_closed(home, monkeypatch, by_variable):
    assert token.close_token() == "none"
    path = home / "mine" if by_variable else home / ".ray" / "auth_token"
    if by_variable:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    path.parent.mkdir(exist_ok=True)
    path.write_text("secret")
    path.chmod(0o644)
    assert token.close_token() == "closed"
    assert mode(path) == 0o600
    assert token.close_token() == "private"
    assert path.read_text() == "secret"


def test_another_users_token_is_reported_as_open(home, monkeypatch):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)

    def refuse(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    assert token.close_token() == "open"


def test_a_token_is_sent_if_there_is_one(home, monkeypatch):
    token.use_token()
    assert not token.is_on()
    assert "you have none" in token.format_refusal("http://head:8265")
    token.make_token()
    token.use_token()
    assert token.is_on()
    assert "refuses your token" in token.format_refusal("http://head:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    token.use_token()
    assert not token.is_on()
    assert "RAY_AUTH_MODE=disabled keeps yours from being sent" in token.format_refusal("it")


@pytest.mark.parametrize("content", ["", "\n", " \r\n"])
def test_a_blank_file_has_no_token(home, monkeypatch, content):
    """Ray refuses to start where it is told to send a token and finds none."""
    file = home / "blank"
    file.write_text(content)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert not token.has_token()
    token.use_token()
    assert not token.is_on()
    assert "is empty or not there" in token.format_refusal("http://head:8265")
    file.write_text("abc\r\n")
    assert token.has_token()


class Head(grpc.GenericRpcHandler):
    """Answers a call without a token as a Ray head does: with or without authentication."""

    def __init__(self, is_open):
        self._answer = (lambda *call: b"") if is_open else self._refuse

    def _refuse(self, request, context):
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self._answer)


@pytest.mark.parametrize("is_open", [True, False])
def test_a_head_tells_whether_it_requires_a_token(is_open):
    """A driver that sends one refuses the calls of a cluster that has none."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head(is_open)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert token.state_of_head(f"127.0.0.1:{port}") == ("open" if is_open else "token")
    finally:
        server.stop(None).wait()


def test_an_address_that_does_not_answer_requires_no_token(monkeypatch):
    monkeypatch.setattr(token, "_CALL_SECONDS", 0.5)
    for address in ("auto", "ray://head:10001", "127.0.0.1:1"):
        assert token.state_of_head(address) in ("unknown", "silent")


_STARTED = """
from raybert.cluster import token as auth
from raybert.cluster.session import RayConfig, ray_session

with ray_session(RayConfig(object_store_gb=0.2)):
    print(auth.is_on(), oct(auth.token_file().stat().st_mode & 0o777))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_is_started_here_requires_a_private_token(home):
    done = subprocess.run(
        [sys.executable, "-c", _STARTED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True", "0o600"], done.stderr
