"""Batches of texts by a budget of tokens, from requests that arrive at any time, and their threads.

The texts of a request join the queue one by one, so that a long list shares batches with others.
Texts that arrive while batches are computed form the next batch, and a request on an idle server
does not wait. A single batch is computed by all cores together, which takes the least time. Where
more than one waits, several are computed at once, with a share of the cores each: throughput is
higher, since cores that share a batch wait for each other after every matrix product.

A queue is full when its work would take longer than `queue_s` at the speed of full batches, which
the warm-up measures first: small ones take long for their size. That is decided here only:
`full_for_s` before a request's body is read, `reserve` before its texts are tokenized, `score` by
their tokens. All methods of Batcher belong to one event loop.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from raybert.inference.classifier import Row
from raybert.tasks.protocol import Outputs

T = TypeVar("T")
Scores = Sequence[npt.NDArray[np.float32]]  # the outputs of each row, [L] or [tokens, L]

_NEWEST_WEIGHT = 0.2  # of the last full batch in the moving averages of speed and request size
_FULL = 0.5  # of the maximum tokens, in all running batches, from which they count as full
_INITIAL_BATCHES = 16  # that may wait before the speed is known
_MIN_BATCHES = 2  # that may wait at any speed
_MAX_SHARES = 4  # with more, a request waits longer for its batch than throughput gains
_SETTING = threading.Lock()


class Overloaded(Exception):
    """The queue is full; it takes about `wait_s` seconds until it is empty."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"overloaded for {wait_s:.1f} s")
        self.wait_s = wait_s


class ModelFailed(Exception):
    """A computation failed; each request of a batch gets an exception of its own."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the model failed: {type(cause).__name__}")
        self.__cause__ = cause


class _Request:
    """The rows of one request, and the scores that are computed so far."""

    def __init__(self, rows: Sequence[Row], future: asyncio.Future[Scores]) -> None:
        self.rows, self.future = rows, future
        self.scores: list[Any] = [None] * len(rows)
        self.missing = len(rows)
        self.waiting = sum(map(_cost, rows))  # tokens in the queue


class _Item(NamedTuple):
    request: _Request
    place: int  # index of the row in the request

    @property
    def row(self) -> Row:
        return self.request.rows[self.place]


class _Batch(NamedTuple):
    """A running batch."""

    items: list[_Item]
    begun: float
    in_share: bool


class Batcher:
    """Passes rows to a function in batches, in the order in which they arrived."""

    def __init__(
        self,
        compute: Callable[[list[Row]], Outputs],
        threads: ModelThreads,
        *,
        tokens_per_batch: int,
        queue_s: float,
        wait_s: float = 0.0,
        speed: float | None = None,
        on_batch: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
    ) -> None:
        """Set up an empty queue.

        Args:
            compute: maps rows, sorted by length, to scores [rows, labels]; thread-safe.
            threads: call `compute`.
            tokens_per_batch: maximum, unless a single row has more.
            queue_s: maximum seconds of work in the queue, at the speed of the last batches.
            wait_s: time that a batch which is not full waits for more rows on an idle server.
            speed: tokens per second of a full batch; None: not known yet.
            on_batch: called with rows, tokens and seconds of every batch.
        """
        self._compute, self._threads = compute, threads
        self._tokens_per_batch, self._queue_s, self._wait_s = tokens_per_batch, queue_s, wait_s
        self._on_batch = on_batch
        self._items: deque[_Item] = deque()
        self._queued_tokens = 0  # of the items whose requests are not cancelled
        self._reserved_tokens = 0  # of accepted requests that are being tokenized
        self._mean_request_tokens = 0.0  # moving average
        self._running: dict[asyncio.Future[Outputs], _Batch] = {}
        self._speed = speed  # tokens per second
        self._timer: asyncio.TimerHandle | None = None
        self._busy_s, self._busy_since = 0.0, 0.0  # before and since the first running batch

    @property
    def busy_s(self) -> float:
        """Seconds in which a batch was computed, since the start."""
        return self._busy_s + (time.monotonic() - self._busy_since if self._running else 0.0)

    @property
    def fill(self) -> float:
        """The work that waits, as a share of what may wait; a large request can make it more."""
        return (self._queued_tokens + self._reserved_tokens) / self.capacity

    @property
    def queued_tokens(self) -> int:
        """Tokens in the queue."""
        return self._queued_tokens

    @property
    def capacity(self) -> int:
        """Tokens that may wait."""
        if self._speed is None:
            return _INITIAL_BATCHES * self._tokens_per_batch
        return max(_MIN_BATCHES * self._tokens_per_batch, int(self._queue_s * self._speed))

    @property
    def mean_request_tokens(self) -> float:
        """Tokens of a request, the mean of the last ones."""
        return self._mean_request_tokens

    @property
    def expected_wait_s(self) -> float:
        """Seconds until the queue is computed, at the speed of the last batches."""
        return (self._queued_tokens + self._reserved_tokens) / self._speed if self._speed else 0.0

    @property
    def running_s(self) -> float:
        """Seconds since the oldest running batch began; 0 where none runs."""
        begun = min((batch.begun for batch in self._running.values()), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    def full_for_s(self, tokens: float | None = None) -> float | None:
        """Return the seconds until a full queue is empty; None: a request is accepted.

        `tokens` of the request are an estimate; None: the mean of the last requests. While the
        queue is empty, a request of any size is accepted.
        """
        waiting = self._queued_tokens + self._reserved_tokens
        more = self._mean_request_tokens if tokens is None else tokens
        is_full = waiting + more > self.capacity
        return self.expected_wait_s if waiting and is_full else None

    @contextmanager
    def reserve(self, tokens: int) -> Iterator[None]:
        """Reserve room for a request while it is tokenized; Overloaded: the queue is full."""
        wait_s = self.full_for_s(tokens)
        if wait_s is not None:
            raise Overloaded(wait_s)
        self._reserved_tokens += tokens
        try:
            yield
        finally:
            self._reserved_tokens -= tokens

    async def score(self, rows: Sequence[Row]) -> Scores:
        """Return the outputs of each row, of at least one, or raise Overloaded or ModelFailed.

        While the queue is empty, a request of any size is accepted. Cancelling removes its rows.
        """
        tokens = sum(map(_cost, rows))
        if self._queued_tokens and self._queued_tokens + tokens > self.capacity:
            raise Overloaded(self.expected_wait_s)
        self._mean_request_tokens += _NEWEST_WEIGHT * (tokens - self._mean_request_tokens)
        request = _Request(rows, asyncio.get_running_loop().create_future())
        self._items.extend(_Item(request, place) for place in range(len(rows)))
        self._queued_tokens += tokens
        self._start(forced=False)
        try:
            return await request.future
        finally:
            self._queued_tokens -= request.waiting  # of a cancelled request
            request.waiting = 0

    def _start(self, *, forced: bool) -> None:
        """Start batches in free threads; a batch that is not full waits for `wait_s` first."""
        if forced:
            self._timer = None
        while self._queued_tokens and (free := self._free_executor()) is not None:
            is_idle = not self._running and self._queued_tokens < self._tokens_per_batch
            if self._wait_s and not forced and is_idle:
                if self._timer is None:
                    loop = asyncio.get_running_loop()
                    self._timer = loop.call_later(self._wait_s, lambda: self._start(forced=True))
                return
            executor, budget = free
            items = self._take(budget)
            if not items:
                return
            # Sorted, since texts of similar length are computed together.
            items.sort(key=lambda item: len(item.row))
            rows = [item.row for item in items]
            loop = asyncio.get_running_loop()
            begun = time.monotonic()
            if not self._running:
                self._busy_since = begun
            future = loop.run_in_executor(executor, self._compute, rows)
            self._running[future] = _Batch(items, begun, executor is self._threads.shares)
            future.add_done_callback(self._finish)

    def _free_executor(self) -> tuple[Executor, int] | None:
        """Return the executor for the next batch and its maximum tokens; None: all are busy."""
        threads, running = self._threads, len(self._running)
        if not running and (threads.count == 1 or self._queued_tokens <= self._tokens_per_batch):
            return threads.all_cores, self._tokens_per_batch
        if running == threads.count or any(not b.in_share for b in self._running.values()):
            return None
        # Equal batches: a longer one would delay the others of a request.
        share = math.ceil(self._queued_tokens / (threads.count - running))
        return threads.shares, min(self._tokens_per_batch, share)

    def _take(self, budget: int) -> list[_Item]:
        """Remove the rows of a batch, at least one, from the head of the queue."""
        batch: list[_Item] = []
        tokens = 0
        while self._items:
            item = self._items[0]
            if item.request.future.done():  # it was cancelled
                self._items.popleft()
                continue
            cost = _cost(item.row)
            if batch and tokens + cost > budget:
                break
            self._items.popleft()
            batch.append(item)
            tokens += cost
            item.request.waiting -= cost
            self._queued_tokens -= cost
        return batch

    def _finish(self, future: asyncio.Future[Outputs]) -> None:
        """Distribute the scores of a batch, or its exception."""
        concurrent = len(self._running)  # batches, including this one
        items, begun, _ = self._running.pop(future)
        now = time.monotonic()
        seconds = max(1e-9, now - begun)
        if not self._running:
            self._busy_s += now - self._busy_since
        self._start(forced=False)  # first of all, so that the thread does not idle
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is None:
            tokens = sum(_cost(item.row) for item in items)
            self._update_speed(tokens * concurrent, seconds)
            self._on_batch(len(items), tokens, seconds)
            scores = future.result()
        for row, item in enumerate(items):
            request = item.request
            if request.future.done():
                continue
            if error is not None:
                request.future.set_exception(ModelFailed(error))
                continue
            request.scores[item.place] = scores[row]
            request.missing -= 1
            if not request.missing:
                request.future.set_result(request.scores)

    def _update_speed(self, tokens: int, seconds: float) -> None:
        """Update the moving average with all batches that ran at once, unless they were small."""
        if tokens < _FULL * self._tokens_per_batch:
            return
        speed = tokens / seconds
        before = speed if self._speed is None else self._speed
        weight = _NEWEST_WEIGHT * min(1.0, tokens / self._tokens_per_batch)
        self._speed = (1 - weight) * before + weight * speed


def _cost(row: Row) -> int:
    """Return the tokens of a row; an empty one counts as 1."""
    return max(1, len(row))


class ModelThreads:
    """One thread that computes with all cores, and several with a share of them each."""

    def __init__(self, threads: int | None = None, *, device: str = "cpu") -> None:
        """Set up for `threads` in all, None: PyTorch's default; on cuda there is one share."""
        self.threads = threads
        cores = threads or torch.get_num_threads()
        #: Batches that are computed at once, when enough wait.
        self.count = min(_MAX_SHARES, cores) if device == "cpu" else 1
        self._share = cores // self.count
        self.all_cores: Executor = ThreadPoolExecutor(1, "compute", use_threads, (threads,))
        self.shares: Executor = ThreadPoolExecutor(self.count, "share", use_threads, (self._share,))

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` once with all cores and once with a share, since it is traced for each.

        In new threads, since those of the queue may be computing requests.
        """
        for threads in {self.threads, self._share if self.count > 1 else self.threads}:
            run_in_new_thread(work, threads)

    def measure(self, work: Callable[[], object]) -> float:
        """Return the seconds that `work` takes with all cores."""

        def timed() -> float:
            begun = time.monotonic()
            work()
            return time.monotonic() - begun

        return run_in_new_thread(timed, self.threads)

    def close(self) -> None:
        """Stop the threads."""
        for executor in (self.all_cores, self.shares):
            executor.shutdown(wait=False, cancel_futures=True)


def run_in_new_thread(work: Callable[[], T], threads: int | None) -> T:
    """Run `work` in a new thread, which ends with OpenMP's threads that belong to it.

    OpenMP starts threads for each thread that computes, and keeps them as long as that thread
    lives. If more exist than there are cores, none waits actively between two products: being woken
    a hundred times took a text of 200 tokens from 7.5 ms to 19 (int8, two cores). Occasional work
    therefore runs in threads that end.
    """
    with ThreadPoolExecutor(1, "once", use_threads, (threads,)) as executor:
        return executor.submit(work).result()


def use_threads(threads: int | None) -> None:
    """Set the number of threads that PyTorch uses for the calling thread."""
    if threads is not None:
        with _SETTING:
            torch.set_num_threads(threads)
            # A thread adopts the last number that any thread has set, when it first reads it.
            torch.get_num_threads()
