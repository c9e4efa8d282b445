"""Report of every node: versions, memory, clock and storage, as a process on that node sees them.

Only such a process can tell: a path may be a different folder on each node, a package may be
missing, a clock may be wrong.
"""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from raybert import __version__
from raybert.cluster import token as auth
from raybert.cluster.session import gpu_type
from raybert.errors import RaybertError
from raybert.storage.folder import Folder

PACKAGES = ("ray", "torch", "tokenizers", "pyarrow")
MISSING = "missing"

_SHARED_MEMORY = "/dev/shm"
_START_SECONDS = 60.0  # for an actor on each node, which may download a job's package first
_CALL_SECONDS = 30.0
_CLOCK_SECONDS = 5.0
_CLOCK_ROUNDS = 3
_VISIBLE_SECONDS = 5.0  # NFS caches for some seconds that a file does not exist


@dataclass
class NodeReport:
    """A node of the cluster and the state of raybert on it."""

    id: str  # hexadecimal
    name: str  # its address
    cpus: float = 0.0
    gpus: float = 0.0
    gpu: str = ""  # accelerator type by Ray's name: H100
    object_store: int = 0  # bytes
    error: str = ""  # why no process of raybert runs there
    versions: dict[str, str] = field(default_factory=dict)
    shared_memory: int | None = None  # bytes of /dev/shm; None where there is none
    token: auth.Privacy = "none"
    clock_offset: float | None = None  # seconds ahead of this process's clock
    storage_error: str = ""  # why it can't use the storage
    unseen: tuple[str, ...] = ()  # names of nodes whose files in the storage it does not see
    free: int | None = None  # bytes of the storage; None where unknown


def versions() -> dict[str, str]:
    """Return the versions of raybert, its main dependencies and Python in this process."""
    found = {"raybert": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = MISSING
    return {**found, "python": platform.python_version()}


def alive_nodes() -> list[NodeReport]:
    """Return the live nodes of the connected Ray cluster, sorted by name, without their probes."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    count = Counter(node["NodeManagerAddress"] for node in alive)
    nodes = []
    for node in alive:
        address, identity, total = node["NodeManagerAddress"], node["NodeID"], node["Resources"]
        nodes.append(
            NodeReport(
                id=identity,
                name=address if count[address] == 1 else f"{address} ({identity[:6]})",
                cpus=total.get("CPU", 0.0),
                gpus=total.get("GPU", 0.0),
                gpu=gpu_type(total),
                object_store=int(total.get("object_store_memory", 0)),
            )
        )
    return sorted(nodes, key=lambda node: node.name)


def probe_nodes(nodes: Sequence[NodeReport], storage: str, log: Callable[[str], None]) -> None:
    """Complete the reports of all live nodes with an actor on each.

    In the storage, a path or URI, a hidden folder is created and deleted.
    """
    log(f"probing {len(nodes)} node{'s' if len(nodes) != 1 else ''}")
    with start_actors(_Probe, [on_node(node.id) for node in nodes]) as actors:
        probes = {node.id: actor for node, actor in zip(nodes, actors, strict=True)}
        reports = gather([actor.inspect.remote() for actor in actors], _START_SECONDS)
        for node, report in zip(nodes, reports, strict=True):
            if isinstance(report, BaseException):
                node.error = format_error(report)
            else:
                node.versions, node.shared_memory, node.token = report
        working = [node for node in nodes if not node.error]
        for node in working:
            with suppress(Exception):  # the storage test reports a node that has died by now
                rounds = [_clock_offset(probes[node.id]) for _ in range(_CLOCK_ROUNDS)]
                node.clock_offset = min(rounds)[1]  # the shortest round trip is the most exact
        log("writing to the storage and reading it")
        _test_storage(working, probes, storage)


def _clock_offset(probe: Any) -> tuple[float, float]:
    """Return the round-trip time and how far the node's clock is ahead, both in seconds."""
    import ray

    sent = time.time()
    remote = ray.get(probe.clock.remote(), timeout=_CLOCK_SECONDS)
    received = time.time()
    return received - sent, remote - (sent + received) / 2


def _test_storage(nodes: Sequence[NodeReport], probes: Mapping[str, Any], storage: str) -> None:
    """Let every node write a file, then let each look for the files of all others."""
    folder = f".raybert-doctor-{secrets.token_hex(4)}"
    names = {node.id: node.name for node in nodes}
    calls = [probes[node.id].write.remote(storage, folder, node.id) for node in nodes]
    for node, result in zip(nodes, gather(calls, _CALL_SECONDS), strict=True):
        failed = isinstance(result, BaseException)
        node.storage_error, node.free = (format_error(result), None) if failed else result
    writers = [node for node in nodes if not node.storage_error]
    written = [node.id for node in writers]
    calls = [probes[node.id].find_unseen.remote(storage, folder, written) for node in writers]
    for node, result in zip(writers, gather(calls, _CALL_SECONDS), strict=True):
        if isinstance(result, BaseException):
            node.storage_error = format_error(result)
        else:
            node.unseen = tuple(names[other] for other in result)
    for node in nodes:  # in turn, because concurrent deletions of one folder collide
        gather([probes[node.id].clean.remote(storage, folder)], _CALL_SECONDS)


class _Probe:
    """An actor that inspects its node."""

    def inspect(self) -> tuple[dict[str, str], int | None, auth.Privacy]:
        """Return the versions, the bytes of /dev/shm, and the privacy of Ray's token."""
        total = None
        with suppress(OSError):
            total = shutil.disk_usage(_SHARED_MEMORY).total
        return versions(), total, auth.close_token()

    def clock(self) -> float:
        """Return Unix time in seconds."""
        return time.time()

    def write(self, storage: str, folder: str, name: str) -> tuple[str, int | None]:
        """Write a file whose text is its name; return the error, if any, and the free bytes."""
        try:
            root = Folder(storage)
            (root / folder).write_text(name, name)
            return "", shutil.disk_usage(root.path).free if root.is_local else None
        except (RaybertError, OSError) as error:
            return str(error), None

    def find_unseen(self, storage: str, folder: str, names: Sequence[str]) -> list[str]:
        """Return the names of the files that do not become visible here with their text."""
        written, until = Folder(storage) / folder, time.monotonic() + _VISIBLE_SECONDS
        unseen = list(names)
        while True:
            unseen = [name for name in unseen if not _is_written(written, name)]
            if not unseen or time.monotonic() > until:
                return unseen
            time.sleep(0.2)

    def clean(self, storage: str, folder: str) -> None:
        """Delete the folder, if it is visible here."""
        with suppress(RaybertError, OSError):
            Folder(storage).delete(folder)


def _is_written(folder: Folder, name: str) -> bool:
    with suppress(RaybertError, OSError):
        return folder.read_text(name) == name
    return False


def on_node(identity: str) -> Any:
    """Return the strategy that schedules an actor on a node, by its hexadecimal id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(identity, soft=False)


@contextmanager
def start_actors(kind: type, strategies: Sequence[Any], gpu: bool = False) -> Iterator[list[Any]]:
    """Start an actor for each scheduling strategy, and kill them all on exit.

    They reserve no CPU, so that they also start on a cluster whose CPUs are all in use.
    """
    import ray

    remote = ray.remote(num_cpus=0, num_gpus=int(gpu))(kind)
    actors = [remote.options(scheduling_strategy=strategy).remote() for strategy in strategies]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def gather(references: Sequence[Any], timeout_s: float) -> list[Any]:
    """Return the results of remote calls in order; an exception stands for a call that failed."""
    import ray

    ready = set[Any]()
    if references:
        done, _ = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
        ready = set(done)
    results: list[Any] = []
    for reference in references:
        try:
            if reference not in ready:
                raise RaybertError(f"no answer in {timeout_s:.0f} s")
            results.append(ray.get(reference))
        except Exception as error:  # of any type: it is the node's result
            results.append(error)
    return results


def format_error(error: BaseException) -> str:
    """Return the last line of a remote error, which names its cause."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
