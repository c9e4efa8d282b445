"""Read from HAProxy's admin socket how many requests it has rejected itself.

`raybert serve` starts HAProxy with rules that count them; an HAProxy without has no such table.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from pathlib import Path

REFUSED_TABLE = "raybert-refused"
_TIMEOUT_S = 1.0
_MAX_BYTES = 65_536  # of its answer, which is a line
_COUNT = re.compile(rb"\bgpc0=(\d+)")


def count_refused(path: str) -> int | None:
    """Return the number of requests that HAProxy answered 429; None: it does not say.

    `path` is the socket that Serve was told of; Ray puts it into a folder of the node's beside it.
    """
    given = Path(path)
    sockets = [given, *given.parent.glob(f"*/{given.name}")]
    counts = [count for count in map(_count, map(str, sockets)) if count is not None]
    return sum(counts) if counts else None


def _count(path: str) -> int | None:
    answer = b""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(path)
        connection.sendall(f"show table {REFUSED_TABLE}\n".encode())
        while len(answer) < _MAX_BYTES and (part := connection.recv(4096)):
            answer += part
    if not answer.startswith(b"# table: " + REFUSED_TABLE.encode()):
        return None
    found = _COUNT.search(answer)
    return int(found[1]) if found else 0
