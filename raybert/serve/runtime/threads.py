"""The threads that models compute in: one with all cores, and several with a share of them each.

A single batch is done soonest by all cores together. Where more than one batch waits, several at
once have a higher throughput: cores that share a batch wait for each other at every matrix product,
and all of them for the one that something else, such as reading a request, has just used.

Occasional work runs in a thread that ends with it. OpenMP counts the threads of every team, which
live as long as the thread that they work for. Where there are more of them than cores, none spins
between two products, and waking up a hundred times took a single text of 200 tokens from 7.5 ms to
19 (int8, two cores).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_SETTING = threading.Lock()
_MAX_SHARES = 4  # with more, a request waits longer for its batch than throughput gains


class ModelThreads:
    """Executors for batches."""

    def __init__(self, threads: int | None = None, *, device: str = "cpu") -> None:
        """Set up; threads start when they are needed.

        Args:
            threads: in all; None: PyTorch's default.
            device: cpu or cuda; on cuda there is one share.
        """
        self.threads = threads
        cores = threads or torch.get_num_threads()
        #: Batches that are computed at once, when enough wait.
        self.count = min(_MAX_SHARES, cores) if device == "cpu" else 1
        self._share = cores // self.count
        self.whole: Executor = ThreadPoolExecutor(1, "compute", use_threads, (threads,))
        self.shares: Executor = ThreadPoolExecutor(self.count, "share", use_threads, (self._share,))

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run something once with all cores and once with a share: it is traced for each.

        In new threads, since those of the queue may have requests to compute.
        """
        for threads in {self.threads, self._share if self.count > 1 else self.threads}:
            run_in_new_thread(work, threads)

    def close(self) -> None:
        """Stop the threads."""
        for executor in (self.whole, self.shares):
            executor.shutdown(wait=False, cancel_futures=True)


class NewThreadExecutor(Executor):
    """Runs one task after another, each in a new thread that ends with it."""

    def __init__(self, name: str, threads: int | None) -> None:
        """Set up; `threads` as in `ModelThreads`."""
        self._threads, self._queue = threads, ThreadPoolExecutor(1, name)

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue a task."""
        return self._queue.submit(
            run_in_new_thread, functools.partial(work, *args, **kwargs), self._threads
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks."""
        self._queue.shutdown(wait, cancel_futures=cancel_futures)


def run_in_new_thread(work: Callable[[], T], threads: int | None) -> T:
    """Run something in a thread that ends with it, and with it OpenMP's threads."""
    with ThreadPoolExecutor(1, "once", use_threads, (threads,)) as executor:
        return executor.submit(work).result()


def use_threads(threads: int | None) -> None:
    """Set the number of threads that PyTorch uses for the calling thread."""
    if threads is not None:
        with _SETTING:
            torch.set_num_threads(threads)
            # A thread adopts the last number that any thread has set, when it first reads it.
            torch.get_num_threads()
