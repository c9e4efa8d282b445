"""The threads that models compute in: one with all cores, and several with a share of them each.

A lone batch is done soonest by all cores together. Where more waits than one batch, several at once
do more in all: cores that work on one batch wait for each other at every product, and all of them
for the one that something else, a request being read, has just taken.

What computes only now and then does so in a thread that ends with it. OpenMP counts the threads of
every team, which live as long as the thread that they work for; where there are more than cores,
none stays awake between two products, and to wake up a hundred times took a lone text of 200 tokens
from 7.5 ms to 19 (int8, two cores).
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
_MOST_SHARES = 4  # more, smaller batches would gain less than they keep a request waiting


class ModelThreads:
    """Threads to compute in."""

    def __init__(self, threads: int | None = None, *, device: str = "cpu") -> None:
        """Set up; threads are started when they are needed.

        Args:
            threads: that a model computes with, in all; None: as PyTorch has it.
            device: cpu or cuda, on which nothing is shared.
        """
        self.threads = threads
        cores = threads or torch.get_num_threads()
        #: How many batches are computed at once, where there are as many.
        self.count = min(_MOST_SHARES, cores) if device == "cpu" else 1
        self._share = cores // self.count
        self.whole: Executor = ThreadPoolExecutor(1, "compute", use_threads, (threads,))
        self.shares: Executor = ThreadPoolExecutor(self.count, "share", use_threads, (self._share,))

    def warm(self, work: Callable[[], object]) -> None:
        """Do something once with all cores and once with a share, as it is traced for each.

        In threads of their own: those of the queue have requests to answer meanwhile.
        """
        for threads in {self.threads, self._share if self.count > 1 else self.threads}:
            run_in_new_thread(work, threads)

    def close(self) -> None:
        """Let the threads end."""
        for executor in (self.whole, self.shares):
            executor.shutdown(wait=False, cancel_futures=True)


class NewThreadExecutor(Executor):
    """Does one piece of work after the other, each in a thread that ends with it."""

    def __init__(self, name: str, threads: int | None) -> None:
        """Set up; `threads` as in `Workers`."""
        self._threads, self._queue = threads, ThreadPoolExecutor(1, name)

    def submit(self, work: Callable[..., T], /, *args: Any, **more: Any) -> Future[T]:
        """Queue a piece."""
        return self._queue.submit(
            run_in_new_thread, functools.partial(work, *args, **more), self._threads
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more."""
        self._queue.shutdown(wait, cancel_futures=cancel_futures)


def run_in_new_thread(work: Callable[[], T], threads: int | None) -> T:
    """Do something in a thread that ends with it, and with it all that computed for it."""
    with ThreadPoolExecutor(1, "brief", use_threads, (threads,)) as once:
        return once.submit(work).result()


def use_threads(threads: int | None) -> None:
    """Make models compute with so many threads, when they are called from this one."""
    if threads is not None:
        with _SETTING:
            torch.set_num_threads(threads)
            # A thread takes the number that was set last, by whichever thread, when it first asks.
            torch.get_num_threads()
