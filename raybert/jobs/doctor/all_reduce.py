"""Time an all-reduce between processes on different nodes, which every training step needs.

It fails where nodes cannot connect, or where a hostname resolves to an unreachable address. A
training run would hang for minutes before it reported that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from raybert.errors import RaybertError
from raybert.jobs.doctor.nodes import NodeReport, format_error, gather, on_node, start_actors
from raybert.train.distributed import use_interface_of

_START_SECONDS = 60.0  # importing torch takes long
_STORE_SECONDS = 10.0
_TIMEOUT_SECONDS = 30.0  # of the all-reduce; on a working network it takes a few at most


@dataclass(frozen=True)
class AllReduceResult:
    """Duration of the all-reduce, or why there is none."""

    backend: str
    processes: int
    nodes: int = 0
    seconds: float | None = None  # from connecting to the sum
    error: str = ""
    is_busy: bool = False  # not run, because the GPUs are in use


def spread(slots: Mapping[str, float], count: int) -> list[str]:
    """Assign `count` processes to nodes round-robin, as far as their free slots reach."""
    turns = range(int(max(slots.values(), default=0)))
    return [node for turn in turns for node, free in slots.items() if turn < int(free)][:count]


@contextmanager
def start_processes(nodes: Sequence[NodeReport], count: int, gpu: bool) -> Iterator[list[Any]]:
    """Start at least two processes in the background; none where fewer than two GPUs are free."""
    import ray

    if gpu:
        strategies = ["SPREAD"] * min(count, int(ray.available_resources().get("GPU", 0)))
    else:
        trainers = [node for node in nodes if node.cpus] or nodes  # a head may offer no CPUs
        slots = {node.id: max(2.0, node.cpus) for node in trainers}
        strategies = [on_node(node) for node in spread(slots, count)]
    with start_actors(_Process, strategies if len(strategies) > 1 else [], gpu) as actors:
        yield actors


def run_all_reduce(actors: Sequence[Any], gpu: bool) -> AllReduceResult:
    """Time one all-reduce over the started processes."""
    backend, count = "nccl" if gpu else "gloo", len(actors)
    if not actors:
        return AllReduceResult(backend, count, is_busy=True)
    started = gather([actor.node.remote() for actor in actors], _START_SECONDS)
    for result in started:
        if isinstance(result, BaseException):
            return AllReduceResult(backend, count, error=format_error(result))
    nodes = len(set(started))
    [store] = gather([actors[0].open_store.remote(count)], _STORE_SECONDS)
    if isinstance(store, BaseException):
        return AllReduceResult(backend, count, nodes, error=format_error(store))
    calls = [
        actor.all_reduce.remote(store, rank, count, backend) for rank, actor in enumerate(actors)
    ]
    seconds = gather(calls, _TIMEOUT_SECONDS + _STORE_SECONDS)
    errors = [format_error(result) for result in seconds if isinstance(result, BaseException)]
    if errors:
        return AllReduceResult(backend, count, nodes, error=errors[0])
    return AllReduceResult(backend, count, nodes, seconds=max(seconds))


class _Process:
    """An actor that is one rank of the process group."""

    def __init__(self) -> None:
        import torch.distributed  # noqa: F401 - loaded before the measurement

        self._store: Any = None

    def node(self) -> str:
        """Return the id of its node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def open_store(self, processes: int) -> tuple[str, int]:
        """Open the rendezvous store; return its address and port."""
        import ray.util
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, timeout = str(ray.util.get_node_ip_address()), timedelta(seconds=_TIMEOUT_SECONDS)
        self._store = TCPStore(host, 0, processes, True, timeout, wait_for_workers=False)
        return host, self._store.port

    def all_reduce(
        self, address: tuple[str, int], rank: int, processes: int, backend: str
    ) -> float:
        """Sum a one of every process; return the seconds from connecting to the sum."""
        import ray.util
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        use_interface_of(str(ray.util.get_node_ip_address()))  # as training does
        begun, timeout = time.monotonic(), timedelta(seconds=_TIMEOUT_SECONDS)
        store = self._store or TCPStore(*address, processes, False, timeout, wait_for_workers=False)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=processes, timeout=timeout
        )
        one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(one)
        total = float(one)
        seconds = time.monotonic() - begun
        dist.destroy_process_group()
        if total != processes:
            raise RaybertError(f"the sum over {processes} processes is {total:g}")
        return seconds
