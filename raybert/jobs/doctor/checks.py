"""Checks: pure functions from node reports and settings to results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raybert.cluster import token
from raybert.cluster.session import Resources
from raybert.errors import ConfigError
from raybert.jobs.doctor.all_reduce import AllReduceResult
from raybert.jobs.doctor.nodes import MISSING, NodeReport
from raybert.terminal.formats import size
from raybert.train.ray.placement import check_resources, operator_cpus, uses_gpus
from raybert.train.settings import TrainConfig

_EQUAL = ("raybert", "ray", "torch", "python")  # packages whose versions must agree
_CLOCK_SECONDS = 2.0  # larger differences put the logs of several nodes in a wrong order
_SLOW_SECONDS = 10.0  # an all-reduce takes that long when its first connections time out
_MAX_NAMES = 3  # in a message


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    name: str
    status: Literal["ok", "warning", "problem"]
    message: str  # with the measured values
    remedy: str = ""

    @property
    def line(self) -> str:
        """Message and remedy."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


def check_nodes(nodes: Sequence[NodeReport]) -> CheckResult:
    """Check that a process of raybert runs on every node."""
    failed = [node for node in nodes if node.error]
    if failed:
        message = f"{_names(failed)} can't run raybert: {failed[0].error}"
        remedy = "install raybert's dependencies on every node, and look at `ray status`"
        return CheckResult("nodes", "problem", message, remedy)
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    kinds = sorted({node.gpu for node in nodes if node.gpu})
    total = f"{cpus:g} CPUs, {gpus:g} GPUs{f' ({_first(kinds)})' if kinds else ''}"
    each = _first(f"{node.name} {node.cpus:g} + {node.gpus:g}" for node in nodes)
    return CheckResult("nodes", "ok", f"{_count(nodes)}, {total}: {each}")


def check_versions(nodes: Sequence[NodeReport], client: Mapping[str, str] | None) -> CheckResult:
    """Check that all nodes have the required packages, in the same versions.

    `client` has the versions of the machine that submitted the job; None without submission.
    """
    for package in nodes[0].versions:
        lacking = [node for node in nodes if node.versions[package] == MISSING]
        if lacking:
            message = f"{package} is missing on {_names(lacking)}"
            remedy = "install raybert's dependencies on every node"
            return CheckResult("versions", "problem", message, remedy)
    for package in _EQUAL:
        by_version: dict[str, list[NodeReport]] = {}
        for node in nodes:
            by_version.setdefault(_series(package, node.versions[package]), []).append(node)
        if len(by_version) > 1:
            found = ", ".join(f"{version} on {_names(on)}" for version, on in by_version.items())
            remedy = f"install one version of {package} on every node"
            return CheckResult("versions", "problem", f"{package} differs: {found}", remedy)
    cluster = {package: _series(package, nodes[0].versions[package]) for package in _EQUAL}
    for package, version in cluster.items():
        local = _series(package, (client or cluster).get(package, MISSING))
        if local != version:
            message = f"{package} is {version} on the cluster and {local} on the submitting machine"
            remedy = "install the cluster's version there before you use the run's results"
            return CheckResult("versions", "warning", message, remedy)
    found = ", ".join(f"{package} {version}" for package, version in cluster.items())
    return CheckResult("versions", "ok", f"{found} on {_count(nodes)}")


def check_memory(nodes: Sequence[NodeReport]) -> CheckResult:
    """Check that /dev/shm holds the object store."""
    shared = {node.name: node.shared_memory for node in nodes if node.shared_memory is not None}
    small = [node for node in nodes if shared.get(node.name, node.object_store) < node.object_store]
    if small:
        message = (
            f"{_names(small)}: {size(shared[small[0].name])} in /dev/shm for an object store of "
            f"{size(small[0].object_store)}, so Ray keeps it on the disk, and NCCL may fail"
        )
        remedy = "start the container with --shm-size, or mount an emptyDir of medium Memory there"
        return CheckResult("memory", "warning", message, remedy)
    store = min((node.object_store for node in nodes), default=0)
    memory = f" and {size(min(shared.values()))} in /dev/shm" if shared else ""
    return CheckResult("memory", "ok", f"at least {size(store)} of object store{memory} per node")


def check_storage(nodes: Sequence[NodeReport], storage: str) -> CheckResult:
    """Check that every node writes the storage and reads the files of the others."""
    failed = [node for node in nodes if node.storage_error]
    if failed:
        message = f"{_names(failed)} can't use it: {failed[0].storage_error}"
        remedy = f"let every node write to {storage}, or choose another run.storage"
        return CheckResult("storage", "problem", message, remedy)
    for node in nodes:
        if node.unseen:
            message = (
                f"{node.name} does not see the files of {_first(node.unseen)} in {storage}: it is "
                "not the same folder on every node"
            )
            remedy = (
                "mount one filesystem on every node, or set run.storage to a URI (s3://bucket/runs)"
            )
            return CheckResult("storage", "problem", message, remedy)
    return CheckResult("storage", "ok", f"{_count(nodes)} can write and read {storage}")


def check_space(nodes: Sequence[NodeReport], storage: str, needed: int | None) -> CheckResult:
    """Check that the storage has room for at most `needed` bytes; None: unknown."""
    free = min((node.free for node in nodes if node.free is not None), default=None)
    space = f"the free space of {storage} is unknown" if free is None else f"{size(free)} are free"
    if needed is None:
        return CheckResult("space", "ok", f"{space}; the size of the model is not known yet")
    written = f"checkpoints and model take up to {size(needed)}"
    if free is not None and free < needed:
        message = f"{size(free)} are free in {storage}, {written}"
        remedy = "free some, lower keep_checkpoints, or choose another run.storage"
        return CheckResult("space", "problem", message, remedy)
    return CheckResult("space", "ok", f"{space}, {written}")


def check_workers(config: TrainConfig, resources: Resources) -> CheckResult:
    """Check that the cluster has the resources of the workers, and CPUs for Ray Data besides."""
    name = f"{config.section} workers"
    available = int(resources.cpus) - 1  # a range uses as many as there are
    workers = max(config.min_workers, min(config.max_workers, available))
    gpu = uses_gpus(config, resources.gpus)
    try:
        check_resources(config, gpu, resources)
    except ConfigError as error:
        message, _, remedy = str(error).rpartition("; ")
        return CheckResult(name, "problem", message, remedy)
    free = max(0, int(resources.cpus) - workers)
    share = operator_cpus(free, workers, gpu)
    message = (
        f"{workers} on {'GPUs' if gpu else 'CPUs'}, {free} other CPUs: {share:.2g} for the data "
        "of each"
    )
    if share < 1 and not resources.started_here:
        remedy = f"add CPUs, or lower {config.section}.workers"
        return CheckResult(name, "warning", f"{message}, which may delay training", remedy)
    return CheckResult(name, "ok", message)


def check_all_reduce(result: AllReduceResult) -> CheckResult:
    """Check that processes on different nodes complete an all-reduce, and in a short time."""
    name = "all-reduce"
    if result.is_busy:
        remedy = "check again when they are free, to test the connection of the nodes"
        return CheckResult(name, "warning", "not run, because fewer than two GPUs are free", remedy)
    processes = (
        f"{result.processes} processes on {result.nodes} node{'s' if result.nodes != 1 else ''}"
    )
    remedy = (
        f"let the nodes reach each other on every TCP port, and set {result.backend.upper()}_SOCKET"
        "_IFNAME to the interface of their common network where Ray is started"
    )
    if result.seconds is None:
        message = f"{processes} failed ({result.backend}): {result.error}"
        return CheckResult(name, "problem", message, remedy)
    message = f"{processes} took {result.seconds:.2f} s ({result.backend})"
    if result.seconds > _SLOW_SECONDS:
        return CheckResult(name, "warning", f"{message}, which is slow", remedy)
    return CheckResult(name, "ok", message)


def check_clocks(nodes: Sequence[NodeReport]) -> CheckResult:
    """Check that the clocks agree, which logs and signed requests rely on."""
    offsets = {node.name: node.clock_offset for node in nodes if node.clock_offset is not None}
    wrong = [name for name, seconds in offsets.items() if abs(seconds) > _CLOCK_SECONDS]
    if wrong:
        offset = offsets[wrong[0]]
        message = f"{_first(wrong)}: {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}"
        remedy = "synchronize every node's clock by NTP (chrony)"
        return CheckResult("clocks", "warning", message, remedy)
    most = max((abs(seconds) for seconds in offsets.values()), default=0.0)
    return CheckResult("clocks", "ok", f"at most {most * 1000:.0f} ms apart")


def check_token(nodes: Sequence[NodeReport], is_on: bool) -> CheckResult:
    """Check that Ray requires a token that other users of the nodes cannot read."""
    if not is_on:
        message = "this Ray requires no token: everybody who can connect can run code on it"
        return CheckResult("token", "warning", message, token.HOW_TO_MAKE)
    readable = [node for node in nodes if node.token == "open"]
    if readable:
        message = f"other users can read Ray's token on {_names(readable)}"
        return CheckResult("token", "warning", message, "let its owner set the file's mode to 0600")
    closed = [node for node in nodes if node.token == "closed"]
    if closed:
        message = f"on; its file was readable for others on {_names(closed)}: the mode is 0600 now"
        return CheckResult("token", "ok", message)
    return CheckResult("token", "ok", "on, and other users cannot read its file")


def _series(package: str, version: str) -> str:
    """Return the part of a version that must agree: 3.11 of Python, torch's without `+cpu`."""
    public = version.partition("+")[0]
    return ".".join(public.split(".")[:2]) if package == "python" else public


def _count(nodes: Sequence[NodeReport]) -> str:
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def _names(nodes: Iterable[NodeReport]) -> str:
    return _first(node.name for node in nodes)


def _first(names: Iterable[str]) -> str:
    """Format the first few names and the number of the others."""
    every = list(names)
    more = f" and {len(every) - _MAX_NAMES} more" if len(every) > _MAX_NAMES else ""
    return ", ".join(every[:_MAX_NAMES]) + more
