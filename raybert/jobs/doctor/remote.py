"""Processes on chosen nodes for as long as a question lasts, and answers that may be errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from raybert.errors import RaybertError


def on_node(identity: str) -> Any:
    """The strategy that puts a process on a node, by its id in hexadecimal."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(identity, soft=False)


@contextmanager
def start_actors(kind: type, strategies: Sequence[Any], gpu: bool = False) -> Iterator[list[Any]]:
    """Start an actor for each strategy; in the end all are killed, and what they hold is free.

    They take no CPU of Ray's count, so that they start on a cluster that is at work, too.
    """
    import ray

    remote = ray.remote(num_cpus=0, num_gpus=int(gpu))(kind)
    actors = [remote.options(scheduling_strategy=strategy).remote() for strategy in strategies]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def gather(asked: Sequence[Any], seconds: float) -> list[Any]:
    """The answers, in order; in place of one that does not come, the error."""
    import ray

    ready = set(ray.wait(list(asked), num_returns=len(asked), timeout=seconds)[0] if asked else ())
    found: list[Any] = []
    for reference in asked:
        try:
            if reference not in ready:
                raise RaybertError(f"no answer in {seconds:.0f} s")
            found.append(ray.get(reference))
        except Exception as error:  # whatever it is, it is what the node has to say
            found.append(error)
    return found


def format_error(error: BaseException) -> str:
    """The last line of an error that came from afar: there the cause stands."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
