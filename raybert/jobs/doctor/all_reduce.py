"""A first sum over processes on different nodes: what every step of training does.

It fails where nodes do not reach each other, or name each other by an address that leads nowhere,
and then a run hangs for minutes before it says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from raybert.errors import RaybertError
from raybert.jobs.doctor.nodes import Node
from raybert.jobs.doctor.remote import format_error, gather, on_node, start_actors
from raybert.train.distributed import use_interface_of

_START_SECONDS = 60.0  # torch is large
_MEET_SECONDS = 10.0
_SECONDS = 30.0  # for the sum; between nodes that reach each other it takes a few at most


@dataclass(frozen=True)
class Reduction:
    """What came of it."""

    backend: str
    processes: int
    nodes: int = 0
    seconds: float | None = None  # from the first word to the sum
    error: str = ""
    is_busy: bool = False  # it was not tried, since its GPUs are in use


def places(room: Mapping[str, float], count: int) -> list[str]:
    """The nodes of so many processes: one on each in turn, as long as it has room for one more."""
    left = {node: int(free) for node, free in room.items()}
    chosen: list[str] = []
    while len(chosen) < count and any(left.values()):
        for node in left:
            if left[node] and len(chosen) < count:
                left[node] -= 1
                chosen.append(node)
    return chosen


@contextmanager
def peers(nodes: Sequence[Node], count: int, gpu: bool) -> Iterator[list[Any]]:
    """Start the processes, two at least, or none where there are not two GPUs free.

    They load while others work.
    """
    import ray

    if gpu:
        strategies = ["SPREAD"] * min(count, int(ray.available_resources().get("GPU", 0)))
    else:
        trainers = [node for node in nodes if node.cpus] or nodes  # a head may lend none
        room = {node.id: max(2.0, node.cpus) for node in trainers}
        strategies = [on_node(node) for node in places(room, count)]
    with start_actors(_Peer, strategies if len(strategies) > 1 else [], gpu) as made:
        yield made


def reduce(made: Sequence[Any], gpu: bool) -> Reduction:
    """Sum up over the processes."""
    backend, count = "nccl" if gpu else "gloo", len(made)
    if not made:
        return Reduction(backend, count, is_busy=True)
    found = gather([peer.node.remote() for peer in made], _START_SECONDS)
    for answer in found:
        if isinstance(answer, BaseException):
            return Reduction(backend, count, error=format_error(answer))
    nodes = len(set(found))
    [place] = gather([made[0].meet.remote(count)], _MEET_SECONDS)
    if isinstance(place, BaseException):
        return Reduction(backend, count, nodes, error=format_error(place))
    asked = [peer.reduce.remote(place, rank, count, backend) for rank, peer in enumerate(made)]
    took = gather(asked, _SECONDS + _MEET_SECONDS)
    errors = [format_error(answer) for answer in took if isinstance(answer, BaseException)]
    if errors:
        return Reduction(backend, count, nodes, error=errors[0])
    return Reduction(backend, count, nodes, seconds=max(took))


class _Peer:
    """One of the processes."""

    def __init__(self) -> None:
        import torch.distributed  # noqa: F401 - it takes seconds, which are not to be timed

        self._store: Any = None

    def node(self) -> str:
        """The id of the node that it is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def meet(self, processes: int) -> tuple[str, int]:
        """Open the place where all meet; returns its address and port."""
        import ray.util
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, patience = str(ray.util.get_node_ip_address()), timedelta(seconds=_SECONDS)
        self._store = TCPStore(host, 0, processes, True, patience, wait_for_workers=False)
        return host, self._store.port

    def reduce(self, place: tuple[str, int], rank: int, processes: int, backend: str) -> float:
        """Sum a one of each process up; returns the seconds that it took.

        Raises:
            RaybertError: the sum is another one.
        """
        import ray.util
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        use_interface_of(str(ray.util.get_node_ip_address()))  # as the training does
        begun, patience = time.monotonic(), timedelta(seconds=_SECONDS)
        store = self._store or TCPStore(*place, processes, False, patience, wait_for_workers=False)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=processes, timeout=patience
        )
        one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(one)
        total = float(one)
        seconds = time.monotonic() - begun
        dist.destroy_process_group()
        if total != processes:
            raise RaybertError(f"the sum over {processes} processes is {total:g}")
        return seconds
