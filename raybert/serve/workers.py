"""The threads that models compute in: one with all cores, and several with a share of them each.

A lone batch is done soonest by all cores together. Where more waits than one batch, several at once
do more in all: cores that work on one batch wait for each other at every product, and all of them
for the one that something else, a request being read, has just taken.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

_MOST_SHARES = 4  # more, smaller batches would gain less than they keep a request waiting


class Workers:
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

        In threads of its own: those of the queue have requests to answer meanwhile.
        """
        for threads in {self.threads, self._share if self.count > 1 else self.threads}:
            with ThreadPoolExecutor(1, "warm", use_threads, (threads,)) as once:
                once.submit(work).result()

    def close(self) -> None:
        """Let the threads end."""
        for executor in (self.whole, self.shares):
            executor.shutdown(wait=False, cancel_futures=True)


def use_threads(threads: int | None) -> None:
    """Make models compute with so many threads, when they are called from this one."""
    if threads is not None:
        torch.set_num_threads(threads)
