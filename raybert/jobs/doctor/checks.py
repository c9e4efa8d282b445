"""What is to be thought of a cluster for some runs: pure functions of what its nodes said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raybert.cluster import token
from raybert.cluster.session import Resources
from raybert.errors import ConfigError
from raybert.jobs.doctor.all_reduce import Reduction
from raybert.jobs.doctor.nodes import MISSING, Node
from raybert.terminal.display import size
from raybert.train.ray.placement import check_resources, operator_cpus, uses_gpus
from raybert.train.settings import TrainConfig

_ALIKE = ("raybert", "ray", "torch", "python")  # what all nodes must have in one version
_CLOCK_SECONDS = 2.0  # apart; logs of several nodes are in a wrong order from there on
_SLOW_SECONDS = 10.0  # for a first sum; what is reached by wrong ways first takes that long
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warning", "problem"]
    message: str  # what was found, with its values
    remedy: str = ""  # what to do about it

    @property
    def line(self) -> str:
        """What was found and what to do."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


def of_nodes(nodes: Sequence[Node]) -> CheckResult:
    """Who is there, and who does not answer."""
    silent = [node for node in nodes if node.error]
    if silent:
        return CheckResult(
            "nodes",
            "problem",
            f"{_some(node.name for node in silent)} can't run raybert: {silent[0].error}",
            "install raybert's dependencies on every node, and look at `ray status`",
        )
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    kinds = sorted({node.gpu for node in nodes if node.gpu})
    has = f"{cpus:g} CPUs, {gpus:g} GPUs{f' ({_some(kinds)})' if kinds else ''}"
    each = [f"{node.name} {node.cpus:g} + {node.gpus:g}" for node in nodes]
    return CheckResult("nodes", "ok", f"{_nodes(nodes)}, {has}: {_some(each)}")


def of_versions(nodes: Sequence[Node], client: Mapping[str, str] | None) -> CheckResult:
    """Whether all nodes have what raybert needs, in one version.

    Args:
        nodes: those that answer, one at least.
        client: the versions where a job was submitted; None: it was not.
    """
    for package in nodes[0].versions:
        lacking = [node.name for node in nodes if node.versions[package] == MISSING]
        if lacking:
            return CheckResult(
                "versions",
                "problem",
                f"{package} is missing on {_some(lacking)}",
                "install raybert's dependencies on every node",
            )
    for package in _ALIKE:
        names: dict[str, list[str]] = {}
        for node in nodes:
            names.setdefault(_series(package, node.versions[package]), []).append(node.name)
        if len(names) > 1:
            shown = ", ".join(f"{version} on {_some(on)}" for version, on in names.items())
            remedy = f"install one version of {package} on every node"
            return CheckResult("versions", "problem", f"{package} differs: {shown}", remedy)
    there = {package: _series(package, nodes[0].versions[package]) for package in _ALIKE}
    for package, version in there.items():
        here = _series(package, (client or there).get(package, MISSING))
        if here != version:
            return CheckResult(
                "versions",
                "warning",
                f"{package} is {version} on the cluster and {here} where this was submitted",
                "install the cluster's version there before you use what comes of it",
            )
    shown = ", ".join(f"{package} {version}" for package, version in there.items())
    return CheckResult("versions", "ok", f"{shown} on {_nodes(nodes)}")


def of_memory(nodes: Sequence[Node]) -> CheckResult:
    """Whether the memory that a node's processes share is as large as Ray thinks."""
    shared = {node.name: node.shared_memory for node in nodes if node.shared_memory is not None}
    small = [node for node in nodes if shared.get(node.name, node.object_store) < node.object_store]
    if small:
        has, store = shared[small[0].name], small[0].object_store
        return CheckResult(
            "memory",
            "warning",
            f"{_some(node.name for node in small)}: {size(has)} in /dev/shm for an object store of "
            f"{size(store)}, so Ray keeps it on the disk, and NCCL may fail",
            "start the container with --shm-size, or mount an emptyDir of medium Memory there",
        )
    store = min((node.object_store for node in nodes), default=0)
    beside = f" and {size(min(shared.values()))} in /dev/shm" if shared else ""
    return CheckResult(
        "memory", "ok", f"at least {size(store)} of object store{beside} on every node"
    )


def of_storage(nodes: Sequence[Node], storage: str) -> CheckResult:
    """Whether the storage is one place, which every node can write and read."""
    failed = [node for node in nodes if node.unwritable]
    if failed:
        return CheckResult(
            "storage",
            "problem",
            f"{_some(node.name for node in failed)} can't use it: {failed[0].unwritable}",
            f"let every node write to {storage}, or choose another run.storage",
        )
    blind = [node for node in nodes if node.unseen]
    if blind:
        return CheckResult(
            "storage",
            "problem",
            f"{blind[0].name} does not see what {_some(blind[0].unseen)} wrote to {storage}: each "
            "has a folder of its own there",
            "mount one filesystem on every node, or set run.storage to a URI (s3://bucket/runs)",
        )
    return CheckResult("storage", "ok", f"{storage} is written and read by {_nodes(nodes)}")


def of_space(nodes: Sequence[Node], storage: str, needed: int | None) -> CheckResult:
    """Whether there is room for the checkpoints.

    Args:
        nodes: those that answer.
        storage: where.
        needed: bytes that will be written, at most; None where that is not known.
    """
    free = min((node.free for node in nodes if node.free is not None), default=None)
    room = f"{storage} does not say how much is free" if free is None else f"{size(free)} are free"
    if needed is None:
        return CheckResult("space", "ok", f"{room}; how large the model will be is not known yet")
    if free is not None and free < needed:
        return CheckResult(
            "space",
            "problem",
            f"{size(free)} are free in {storage}, checkpoints and model take up to {size(needed)}",
            "free some, lower keep_checkpoints, or choose another run.storage",
        )
    return CheckResult("space", "ok", f"{room}, checkpoints and model take up to {size(needed)}")


def of_cpus(config: TrainConfig, resources: Resources) -> CheckResult:
    """Whether the cluster has what workers take, and CPUs beside them for Ray Data."""
    name = f"{config.section} workers"
    has_room = int(resources.cpus) - 1  # of a range, as many as there is room for
    workers = max(config.min_workers, min(config.max_workers, has_room))
    gpu = uses_gpus(config, resources.gpus)
    try:
        check_resources(config, gpu, resources)
    except ConfigError as error:
        message, _, remedy = str(error).rpartition("; ")
        return CheckResult(name, "problem", message, remedy)
    free = max(0, int(resources.cpus) - workers)
    share = operator_cpus(free, workers, gpu)
    message = (
        f"{workers} on {'GPUs' if gpu else 'CPUs'}, {free} CPUs beside them: {share:.2g} for the "
        "data of each"
    )
    if share < 1 and not resources.started_here:
        remedy = f"add CPUs, or lower {config.section}.workers"
        return CheckResult(name, "warning", f"{message}, which may have to wait", remedy)
    return CheckResult(name, "ok", message)


def of_reduction(found: Reduction) -> CheckResult:
    """Whether processes on different nodes can sum up."""
    name = "all-reduce"
    if found.is_busy:
        remedy = "check again when they are free, to see whether they reach each other"
        return CheckResult(name, "warning", "not tried, for no two GPUs are free", remedy)
    who = f"{found.processes} processes on {found.nodes} node{'s' if found.nodes != 1 else ''}"
    remedy = (
        f"let the nodes reach each other on every TCP port, and set {found.backend.upper()}_SOCKET_"
        "IFNAME to the interface of their common network where Ray is started"
    )
    if found.seconds is None:
        message = f"{who} can't sum up ({found.backend}): {found.error}"
        return CheckResult(name, "problem", message, remedy)
    message = f"{who} summed up in {found.seconds:.2f} s ({found.backend})"
    if found.seconds > _SLOW_SECONDS:
        return CheckResult(name, "warning", f"{message}, which is slow", remedy)
    return CheckResult(name, "ok", message)


def of_clocks(nodes: Sequence[Node]) -> CheckResult:
    """Whether the clocks agree, which logs and signed requests rely on."""
    ahead = {node.name: node.clock for node in nodes if node.clock is not None}
    wrong = [name for name, seconds in ahead.items() if abs(seconds) > _CLOCK_SECONDS]
    if wrong:
        by = ahead[wrong[0]]
        return CheckResult(
            "clocks",
            "warning",
            f"{_some(wrong)}: {abs(by):.1f} s {'ahead' if by > 0 else 'behind'}",
            "keep the time of every node by NTP (chrony)",
        )
    most = max((abs(seconds) for seconds in ahead.values()), default=0.0)
    return CheckResult("clocks", "ok", f"at most {most * 1000:.0f} ms apart")


def of_token(nodes: Sequence[Node], is_on: bool) -> CheckResult:
    """Whether strangers are kept out, and nobody else reads the token that does it."""
    if not is_on:
        return CheckResult(
            "token",
            "warning",
            "this Ray asks for no token: whoever reaches it runs code on it",
            token.HOW_TO_MAKE,
        )
    readable = [node.name for node in nodes if node.token == "open"]
    if readable:
        return CheckResult(
            "token",
            "warning",
            f"on {_some(readable)} others can read Ray's token",
            "let its owner set the file's mode to 0600",
        )
    closed = [node.name for node in nodes if node.token == "closed"]
    if closed:
        message = f"on; others could read its file on {_some(closed)}: the mode is 0600 now"
        return CheckResult("token", "ok", message)
    return CheckResult("token", "ok", "on, and its file is nobody else's to read")


def _series(package: str, version: str) -> str:
    """The part of a version that has to agree: 3.11 of a Python, and of a torch all but `+cpu`."""
    public = version.partition("+")[0]
    return ".".join(public.split(".")[:2]) if package == "python" else public


def _nodes(nodes: Sequence[Node]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
