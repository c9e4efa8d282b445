"""Short-lived actors on chosen nodes, and results that may be exceptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from raybert.errors import RaybertError


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
