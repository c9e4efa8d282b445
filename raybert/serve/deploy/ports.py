"""Whether a port can be listened on, and who holds one that can't, as far as Linux tells."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from raybert.errors import UserError
from raybert.serve.deploy.haproxy import SCRATCH

_LISTENS = "0A"  # the state of a socket in /proc/net/tcp


class Holder(NamedTuple):
    """A process that listens on a port."""

    pid: int
    name: str
    is_left_over: bool  # the HAProxy of a `raybert serve` that is no more


def check_port(host: str, port: int) -> None:
    """Raise where an address can't be listened on.

    Raises:
        UserError: it can't; with who holds it, and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            reason = error.strerror or str(error)
    refused, advice = f"{host}:{port} can't be listened on: {reason}", ""
    held = holder(port)
    if held is not None:
        refused += f" by process {held.pid} ({held.name})"
    if held is not None and held.is_left_over:
        advice = f"it was left by a `raybert serve` that was killed: `kill {held.pid}`, or "
    raise UserError(f"{refused}; {advice}choose another serve.port or serve.host")


def holder(port: int) -> Holder | None:
    """The process that listens on a TCP port; None where there is none, or none of this user's."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for folder in Path("/proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):  # it has ended, or belongs to another user
            if not sockets.isdisjoint(_open_files(folder)):
                return Holder(int(folder.name), _name(folder), _is_left_over(folder))
    return None


def _open_files(folder: Path) -> Iterator[str]:
    for number in os.listdir(folder / "fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(folder / "fd" / number)


def _listening(port: int) -> Iterator[str]:
    """The inodes of the sockets that listen on a port."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _name(folder: Path) -> str:
    return folder.joinpath("comm").read_text(encoding="utf-8", errors="replace").strip()


def _is_left_over(folder: Path) -> bool:
    """Whether a process is HAProxy with our files, and no Ray is above it any more."""
    arguments = folder.joinpath("cmdline").read_bytes().split(b"\0")
    if not any(argument.startswith(SCRATCH.encode()) for argument in arguments):
        return False
    parent = folder.joinpath("stat").read_text(errors="replace").rpartition(")")[2].split()[1]
    return not _name(folder.parent / parent).startswith("ray::")
