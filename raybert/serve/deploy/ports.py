"""Check that a port is free, and name the process that listens on one that is not."""

from __future__ import annotations

import socket
from typing import NamedTuple

import psutil

from raybert.errors import UserError
from raybert.serve.deploy.haproxy import SCRATCH_PREFIX


class Listener(NamedTuple):
    """A process that listens on a port."""

    pid: int
    name: str
    is_orphan: bool  # the HAProxy of a `raybert serve` that was killed


def check_port(host: str, port: int) -> None:
    """Check that an address can be bound.

    Raises:
        UserError: it can't; the message names the listening process and a remedy.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            problem = f"{host}:{port} can't be listened on: {error.strerror or error}"
    advice = ""
    listener = find_listener(port)
    if listener is not None:
        problem += f" by process {listener.pid} ({listener.name})"
        if listener.is_orphan:
            advice = f"it was left by a `raybert serve` that was killed: `kill {listener.pid}`, or "
    raise UserError(f"{problem}; {advice}choose another serve.port or serve.host")


def find_listener(port: int) -> Listener | None:
    """Find the process that listens on a TCP port; None: no process that this user may inspect."""
    try:
        pids = [
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        for pid in pids:
            if pid is not None:
                process = psutil.Process(pid)
                return Listener(pid, process.name(), _is_orphan(process))
    except psutil.Error:  # it ended meanwhile, or macOS requires root
        pass
    return None


def _is_orphan(process: psutil.Process) -> bool:
    """Return whether a process is an HAProxy that we configured and whose Ray has ended."""
    if not any(argument.startswith(SCRATCH_PREFIX) for argument in process.cmdline()):
        return False
    parent = process.parent()
    return parent is None or not " ".join(parent.cmdline()).startswith("ray::")
