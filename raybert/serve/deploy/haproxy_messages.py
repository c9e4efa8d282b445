"""HAProxy's responses to what is no HTTP request, 400 and 408, in the form of all other errors.

HAProxy 2.8 sends these from constants in its program (`http_err_msgs`, in `h1_send_error`),
whatever `errorfile` says: they come from its parser, before there is a request. A private copy of
the program has our responses in their place, byte for byte as long. A frontend in front that
translates them would cost every request a hop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

_LOG = logging.getLogger(__name__)
_NAMES = {400: b"HTTP/1.1 400 Bad request\r\n", 408: b"HTTP/1.1 408 Request Time-out\r\n"}


def error_response(
    status: int, reason: str, body: Mapping[str, str], length: int | None = None
) -> bytes:
    """Return an HTTP response; spaces after the JSON make it `length` bytes long, if it fits."""
    content = json.dumps(body, separators=(",", ":"))
    shortest = _response(status, reason, content)
    for size in range(len(content), length or 0):
        padded = _response(status, reason, content.ljust(size))
        if len(padded) == length:
            return padded
    return shortest


def _response(status: int, reason: str, content: str) -> bytes:
    head = (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nCache-Control: no-cache\r\nConnection: close\r\n\r\n"
    )
    return (head + content).encode()


def with_messages(
    binary: str, scratch: Path, errors: Mapping[int, tuple[str, Mapping[str, str]]]
) -> str:
    """Copy HAProxy into `scratch` with other responses; return the path of the program to start.

    `errors` are the reasons and bodies by status. Another HAProxy, without the constants or with
    shorter ones, is started as it is.
    """
    program = Path(binary).read_bytes()
    for status, (reason, body) in errors.items():
        found = _find_message(program, status)
        response = error_response(status, reason, body, len(found))
        if len(response) != len(found):
            _LOG.warning("HAProxy answers %d in a form of its own: it is another version", status)
            return binary
        program = program.replace(found, response)
    copy = scratch / "haproxy"
    copy.write_bytes(program)
    copy.chmod(0o700)
    libraries = Path(binary).resolve().parent / "lib"  # $ORIGIN/lib
    if libraries.exists() and not (scratch / "lib").exists():
        (scratch / "lib").symlink_to(libraries)
    return str(copy)


def _find_message(program: bytes, status: int) -> bytes:
    """Return the constant response of a status; empty: there is none, or more than one."""
    if program.count(_NAMES[status]) != 1:
        return b""
    begin = program.index(_NAMES[status])
    return program[begin : program.index(b"\0", begin)]
