"""Ray's authentication token. Whoever has it can run code on the cluster, so its file is private.

Ray takes the first that it finds of RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, and
`~/.ray/auth_token`. A Ray that is started by `ray.init` requires a token unless RAY_AUTH_MODE says
otherwise; if there is none it writes one, which by default every user of the machine can read. One
that is started by `ray start` requires a token only if it finds one.
"""

from __future__ import annotations

import importlib
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Literal

from raybert.cluster.internals import core

TOKEN_FILE = "~/.ray/auth_token"
HOW_TO_MAKE = (
    "run `ray get-auth-token --generate` on the head, copy its ~/.ray/auth_token to every node and "
    "to this machine (chmod 600 ~/.ray/auth_token), and start Ray again with RAY_AUTH_MODE=token"
)

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_OTHERS = 0o077  # the permissions of everybody but the owner
_CALL_SECONDS = 10

Privacy = Literal["none", "private", "closed", "open"]


def is_on() -> bool:
    """Whether Ray sends and requires a token in this process and those that it starts."""
    return os.environ.get(_MODE, "").lower() == "token"


def has_token() -> bool:
    """Whether Ray would find a token on this machine."""
    if os.environ.get(_TOKEN):
        return True
    try:
        return bool(token_file().read_bytes().strip())  # Ray passes over a file of blanks
    except OSError as error:
        return not isinstance(error, FileNotFoundError | NotADirectoryError)


def token_file() -> Path:
    """The file that Ray reads a token from."""
    return Path(os.environ.get(_PATH) or TOKEN_FILE).expanduser()


def use_token() -> None:
    """Send the token if there is one: Ray's clients do so only with RAY_AUTH_MODE=token.

    Ray reads the variable once, when it is imported, which may have been before.
    """
    if has_token():
        os.environ.setdefault(_MODE, "token")
        core.reload_environment()


HeadState = Literal["open", "token", "silent", "unknown"]


def state_of_head(address: str) -> HeadState:
    """Ask the Ray head at `host:port` for a sign of life.

    open: it requires no token; token: it does; silent: nothing answers as a head does. A driver
    without a required token is refused after 20 s of retries, and one of a silent address waits for
    minutes. A driver that sends a token to a cluster without tokens refuses the cluster's own
    calls, and loses its actors.
    """
    if "://" in address or ":" not in address or os.environ.get(core.USE_TLS, "0") != "0":
        return "unknown"
    grpc = importlib.import_module("grpc")
    silent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(core.CHECK_ALIVE)(b"", timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return "token"
            return "silent" if error.code() in silent else "unknown"
    return "open"


def format_refusal(where: str) -> str:
    """The message for a user whom Ray at `where` refused, with the remedy."""
    state = "asks for a token, and you have none"
    if _PATH in os.environ and not has_token():
        state = f"asks for a token, and {token_file()}, which {_PATH} names, is empty or not there"
    elif has_token():
        state = "refuses your token"
        if not is_on():
            mode = f"{_MODE}={os.environ.get(_MODE, '')}"
            return f"{where} asks for a token, and {mode} keeps yours from being sent; unset it"
    return (
        f"{where} {state}; copy the cluster's into {TOKEN_FILE} (mode 0600) or RAY_AUTH_TOKEN; on "
        "the head, `ray get-auth-token` prints it"
    )


def make_token() -> None:
    """Write a token where Ray is about to write one, with permissions for its owner only."""
    if os.environ.get(_MODE, "token").lower() != "token" or has_token():
        return
    path = token_file()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with suppress(OSError):  # Ray then writes one itself, or reports why it can't
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.touch(mode=0o600, exist_ok=False)
            beside.write_text(secrets.token_hex(32))
            os.link(beside, path)  # atomic, and never over another process's
        finally:
            beside.unlink(missing_ok=True)


def close_token() -> Privacy:
    """Remove the permissions of others on the token's file, and return what was found.

    none: there is no file; private: others had no permissions; closed: they were removed; open:
    others can read it, and only its owner may change that.
    """
    path = token_file()
    try:
        if not path.stat().st_mode & _OTHERS:
            return "private"
    except OSError:
        return "none"
    try:
        path.chmod(0o600)
    except OSError:  # another user's, or on a read-only mount
        return "open"
    return "closed"
