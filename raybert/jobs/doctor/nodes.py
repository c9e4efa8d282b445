"""What a cluster's nodes say of themselves, asked of a process that sits on each of them.

Only what such a process sees counts: a folder of the same name may be another one there, a package
may be missing, a clock may be wrong.
"""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from raybert import __version__
from raybert.cluster import token as auth
from raybert.errors import RaybertError
from raybert.jobs.doctor.remote import format_error, gather, on_node, start_actors
from raybert.storage.folder import Folder

PACKAGES = ("ray", "torch", "tokenizers", "pyarrow")
MISSING = "missing"

_SHARED_MEMORY = "/dev/shm"
_START_SECONDS = 60.0  # for a process on each node, which may have to fetch a job's package first
_ANSWER_SECONDS = 30.0
_CLOCK_SECONDS = 5.0
_CLOCK_ROUNDS = 3
_SIGHT_SECONDS = 5.0  # until what one node wrote is seen by all: NFS remembers what was not there


@dataclass
class Node:
    """A node, and what was heard of it."""

    id: str  # in hexadecimal
    name: str  # its address
    cpus: float = 0.0
    gpus: float = 0.0
    gpu: str = ""  # the GPUs' kind, in Ray's words: H100
    object_store: int = 0  # bytes
    error: str = ""  # why it says nothing
    versions: dict[str, str] = field(default_factory=dict)
    shared_memory: int | None = None  # bytes of /dev/shm; None where there is none
    token: auth.Privacy = "none"
    clock: float | None = None  # seconds ahead of this process's
    unwritable: str = ""  # why it can't use the storage
    unseen: tuple[str, ...] = ()  # the names of nodes whose files in the storage it does not see
    free: int | None = None  # bytes of the storage; None where there is no such number


def versions() -> dict[str, str]:
    """The versions of raybert, of what it stands on, and of Python, in this process."""
    found = {"raybert": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = MISSING
    return {**found, "python": platform.python_version()}


def alive() -> list[Node]:
    """The nodes of the connected Ray cluster, as Ray lists them, by name."""
    import ray

    listed = [node for node in ray.nodes() if node["Alive"]]
    times = Counter(node["NodeManagerAddress"] for node in listed)
    nodes = []
    for node in listed:
        address, identity, has = node["NodeManagerAddress"], node["NodeID"], node["Resources"]
        kinds = [name.partition(":")[2] for name in has if name.startswith("accelerator_type:")]
        nodes.append(
            Node(
                id=identity,
                name=address if times[address] == 1 else f"{address} ({identity[:6]})",
                cpus=has.get("CPU", 0.0),
                gpus=has.get("GPU", 0.0),
                gpu=kinds[0] if kinds else "",
                object_store=int(has.get("object_store_memory", 0)),
            )
        )
    return sorted(nodes, key=lambda node: node.name)


def ask(nodes: Sequence[Node], storage: str, tell: Callable[[str], None]) -> None:
    """Fill in what each node says.

    Args:
        nodes: all that are alive.
        storage: the path or URI that they are to share; a hidden folder in it comes and goes.
        tell: is given what is being done, as a line.
    """
    tell(f"asking {len(nodes)} node{'s' if len(nodes) != 1 else ''}")
    with start_actors(_Probe, [on_node(node.id) for node in nodes]) as probes:
        of = {node.id: probe for node, probe in zip(nodes, probes, strict=True)}
        seen = gather([of[node.id].look.remote() for node in nodes], _START_SECONDS)
        for node, told in zip(nodes, seen, strict=True):
            if isinstance(told, BaseException):
                node.error = format_error(told)
            else:
                node.versions, node.shared_memory, node.token = told
        there = [node for node in nodes if not node.error]
        for node in there:
            with suppress(Exception):  # a node that is gone by now is missed where it matters more
                rounds = [_ahead(of[node.id]) for _ in range(_CLOCK_ROUNDS)]
                node.clock = min(rounds)[1]  # the quickest answer's is the nearest to the truth
        tell("writing to the storage and reading it")
        _exchange(there, of, storage)


def _ahead(probe: Any) -> tuple[float, float]:
    """How long a question took, and how far the other clock is ahead; both in seconds."""
    import ray

    asked = time.time()
    there = ray.get(probe.clock.remote(), timeout=_CLOCK_SECONDS)
    heard = time.time()
    return heard - asked, there - (asked + heard) / 2


def _exchange(nodes: Sequence[Node], probes: Mapping[str, Any], storage: str) -> None:
    """Fill in what each node can write and read: every one writes, then all read what all wrote."""
    folder = f".raybert-doctor-{secrets.token_hex(4)}"
    names = {node.id: node.name for node in nodes}
    asked = [probes[node.id].write.remote(storage, folder, node.id) for node in nodes]
    for node, told in zip(nodes, gather(asked, _ANSWER_SECONDS), strict=True):
        failed = isinstance(told, BaseException)
        node.unwritable, node.free = (format_error(told), None) if failed else told
    writers = [node for node in nodes if not node.unwritable]
    written = [node.id for node in writers]
    asked = [probes[node.id].read.remote(storage, folder, written) for node in writers]
    for node, told in zip(writers, gather(asked, _ANSWER_SECONDS), strict=True):
        if isinstance(told, BaseException):
            node.unwritable = format_error(told)
        else:
            node.unseen = tuple(names[other] for other in told)
    for node in nodes:  # one after the other: two that delete one folder are in each other's way
        gather([probes[node.id].clean.remote(storage, folder)], _ANSWER_SECONDS)


class _Probe:
    """Answers for the node that it sits on."""

    def look(self) -> tuple[dict[str, str], int | None, auth.Privacy]:
        """The versions here, the bytes of /dev/shm, and who can read Ray's token."""
        total = None
        with suppress(OSError):
            total = shutil.disk_usage(_SHARED_MEMORY).total
        return versions(), total, auth.close_token()

    def clock(self) -> float:
        """Unix time, seconds."""
        return time.time()

    def write(self, storage: str, folder: str, name: str) -> tuple[str, int | None]:
        """Write a file of this node's; returns why it could not, and the bytes that are free."""
        try:
            there = Folder(storage)
            (there / folder).write_text(name, name)
            return "", shutil.disk_usage(there.path).free if there.is_local else None
        except (RaybertError, OSError) as error:
            return str(error), None

    def read(self, storage: str, folder: str, names: Sequence[str]) -> list[str]:
        """Look for files that are named as what they hold; returns those that stay out of sight."""
        there, ends = Folder(storage) / folder, time.monotonic() + _SIGHT_SECONDS
        unseen = list(names)
        while True:
            unseen = [name for name in unseen if not _is_written(there, name)]
            if not unseen or time.monotonic() > ends:
                return unseen
            time.sleep(0.2)

    def clean(self, storage: str, folder: str) -> None:
        """Delete what was written, as far as it is seen here."""
        with suppress(RaybertError, OSError):
            Folder(storage).delete(folder)


def _is_written(folder: Folder, name: str) -> bool:
    with suppress(RaybertError, OSError):
        return folder.read_text(name) == name
    return False
