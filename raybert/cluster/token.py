"""Ray's token: whoever has it runs code on the cluster, so nobody else on this machine reads it.

Ray takes the first it finds of RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, and
`~/.ray/auth_token`. A Ray that is started in this process is in token mode unless RAY_AUTH_MODE
says otherwise; where there is no token it writes one, which by default everybody may read. One that
`ray start` starts is in token mode only where it finds a token.
"""

from __future__ import annotations

import importlib
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Literal

TOKEN_FILE = "~/.ray/auth_token"
HOW_TO_MAKE = (
    "run `ray get-auth-token --generate` on the head, copy its ~/.ray/auth_token to every node and "
    "to this machine (chmod 600 ~/.ray/auth_token), and start Ray again with RAY_AUTH_MODE=token"
)

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_OTHERS = 0o077  # the rights of everybody but the owner

_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # of a head, with no arguments
_ASK_SECONDS = 5

Privacy = Literal["none", "private", "closed", "open"]


def is_on() -> bool:
    """Whether Ray is in token mode in this process, and in what it starts."""
    return os.environ.get(_MODE, "").lower() == "token"


def has_token() -> bool:
    """Whether Ray would find a token here."""
    return bool(os.environ.get(_TOKEN)) or token_file().exists()


def token_file() -> Path:
    """The file that a token would be read from."""
    return Path(os.environ.get(_PATH) or TOKEN_FILE).expanduser()


def use_token() -> None:
    """Use a token where there is one: Ray's clients ask to be told."""
    if has_token():
        os.environ.setdefault(_MODE, "token")


def is_asked_for(address: str) -> bool:
    """Whether a Ray head, at `host:port`, asks for a token; False where it can't be found out.

    Ray refuses a driver without one after 20 s of trying; a driver that has one where nobody asks
    for it refuses the cluster's own calls, and loses its actors.
    """
    if "://" in address or ":" not in address:
        return False
    grpc = importlib.import_module("grpc")
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=_ASK_SECONDS)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def refusal(where: str) -> str:
    """What to tell whom Ray at `where` did not let in."""
    state = "asks for a token, and you have none"
    if _PATH in os.environ and not has_token():
        state = f"asks for a token, and {token_file()}, which {_PATH} names, is not there"
    elif has_token():
        state = "refuses your token" if is_on() else "asks for a token, and you do not send yours"
    return (
        f"{where} {state}; copy the cluster's into {TOKEN_FILE} (mode 0600) or RAY_AUTH_TOKEN, and "
        "set RAY_AUTH_MODE=token; on the head, `ray get-auth-token` prints it"
    )


def make_token() -> None:
    """Make the user's token where Ray is about to make one, but for nobody else to read."""
    if os.environ.get(_MODE, "token").lower() != "token" or has_token():
        return
    path = token_file()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with suppress(OSError):  # Ray makes one itself, or says why it can't
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.touch(mode=0o600, exist_ok=False)
            beside.write_text(secrets.token_hex(32))
            os.link(beside, path)  # whole or not at all, and never over another process's
        finally:
            beside.unlink(missing_ok=True)


def close_token() -> Privacy:
    """Take everybody else's rights to the token's file, where it is the user's own.

    Returns:
        none: there is no such file; private: nobody else could read it; closed: others could, until
        now; open: others can, and only its owner may change that.
    """
    path = token_file()
    try:
        if not path.stat().st_mode & _OTHERS:
            return "private"
    except OSError:
        return "none"
    try:
        path.chmod(0o600)
    except OSError:  # another user's, or mounted to be read only
        return "open"
    return "closed"
