"""Batches of texts by a budget of tokens, out of requests that come at any time.

A request's texts join the queue row by row, so that a long list shares batches with others. While
batches are computed in threads, the next one gathers: under load batches fill themselves, and a
lone request waits for nobody. Where more waits than one batch, several are computed at once, with a
share of the cores each (`workers`). What would wait too long is refused at once.

All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from raybert.inference.windows import Row

Scores = npt.NDArray[np.float32]

_MEMORY = 0.2  # weight of the newest full batch in the speed that waiting is judged by
_FIRST_BATCHES = 16  # that may wait before any speed is known
_FEWEST_BATCHES = 2  # that may wait at any speed


class Overloaded(Exception):
    """There is too much before a request; `wait_s` says how long that will take."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"overloaded for {wait_s:.1f} s")
        self.wait_s = wait_s


class Failed(Exception):
    """A batch could not be computed; each of its requests gets an exception of its own."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the model failed: {type(cause).__name__}")
        self.__cause__ = cause


class Threads(Protocol):
    """Where batches are computed: `whole` with all cores, `count` at once in `shares`."""

    whole: Executor
    shares: Executor
    count: int


class _Request:
    """The rows of one request, and the scores that have come for them."""

    def __init__(self, rows: Sequence[Row], future: asyncio.Future[Scores]) -> None:
        self.rows, self.future = rows, future
        self.scores: list[Any] = [None] * len(rows)
        self.missing = len(rows)
        self.waiting = sum(map(_cost, rows))  # tokens that are still in the queue


class _Item(NamedTuple):
    request: _Request
    place: int  # of the row among the request's

    @property
    def row(self) -> Row:
        return self.request.rows[self.place]


class _Batch(NamedTuple):
    """A batch under way."""

    items: list[_Item]
    begun: float
    in_share: bool


class Batcher:
    """Hands rows to a function in batches, in the order in which they came."""

    def __init__(
        self,
        compute: Callable[[list[Row]], Scores],
        threads: Threads,
        *,
        tokens_per_batch: int,
        queue_s: float,
        wait_s: float = 0.0,
        on_batch: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
    ) -> None:
        """Set up an empty queue.

        Args:
            compute: rows, sorted by length, to scores [rows, labels]; safe for threads.
            threads: where.
            tokens_per_batch: in a batch at most, unless a single row has more.
            queue_s: seconds of work that may wait, at the speed of the last batches.
            wait_s: for which a batch that is not full waits for company while nothing runs.
            on_batch: is told rows, tokens and seconds of every batch.
        """
        self._compute, self._threads = compute, threads
        self._tokens_per_batch, self._queue_s, self._wait_s = tokens_per_batch, queue_s, wait_s
        self._on_batch = on_batch
        self._items: deque[_Item] = deque()
        self._queued = 0  # tokens of the items whose requests are still wanted
        self._expected = 0  # tokens of requests that are let in, and still being read
        self._typical = 0.0  # tokens of a request
        self._running: dict[asyncio.Future[Scores], _Batch] = {}
        self._speed: float | None = None  # tokens per second
        self._timer: asyncio.TimerHandle | None = None

    @property
    def queued(self) -> int:
        """Tokens that wait."""
        return self._queued

    @property
    def capacity(self) -> int:
        """Tokens that may wait."""
        if self._speed is None:
            return _FIRST_BATCHES * self._tokens_per_batch
        return max(_FEWEST_BATCHES * self._tokens_per_batch, int(self._queue_s * self._speed))

    @property
    def expected_wait_s(self) -> float:
        """Seconds until what waits now is computed, by the speed of the last batches."""
        return (self._queued + self._expected) / self._speed if self._speed else 0.0

    @property
    def running_s(self) -> float:
        """Seconds since the oldest batch under way has begun; 0 where there is none."""
        begun = min((batch.begun for batch in self._running.values()), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    def check(self, tokens: float | None = None) -> None:
        """Refuse a request for which there is no room.

        Args:
            tokens: that it has, as far as is known; None: as many as others have.

        Raises:
            Overloaded: there is none. A request that finds nothing before it has room.
        """
        waiting = self._queued + self._expected
        if waiting and waiting + (self._typical if tokens is None else tokens) > self.capacity:
            raise Overloaded(self.expected_wait_s)

    @contextmanager
    def expecting(self, tokens: int) -> Iterator[None]:
        """Keep room for a request while it is read: others are refused before they are, too."""
        self._expected += tokens
        try:
            yield
        finally:
            self._expected -= tokens

    async def score(self, rows: Sequence[Row]) -> Scores:
        """Score rows, at least one: [rows, labels].

        A request that is larger than the whole queue may wait alone. Cancelling takes rows that
        have not begun out of the queue.

        Raises:
            Overloaded: too many tokens wait already.
        """
        tokens = sum(map(_cost, rows))
        if self._queued and self._queued + tokens > self.capacity:
            raise Overloaded(self.expected_wait_s)
        self._typical += _MEMORY * (tokens - self._typical)
        request = _Request(rows, asyncio.get_running_loop().create_future())
        self._items.extend(_Item(request, place) for place in range(len(rows)))
        self._queued += tokens
        self._start(forced=False)
        try:
            return await request.future
        finally:
            self._queued -= request.waiting  # what a cancelled request leaves behind
            request.waiting = 0

    def _start(self, *, forced: bool) -> None:
        """Begin batches where there is room, and enough waits, or has waited enough."""
        if forced:
            self._timer = None
        while self._queued and (place := self._place()) is not None:
            lone = not self._running and self._queued < self._tokens_per_batch
            if self._wait_s and not forced and lone:
                if self._timer is None:
                    loop = asyncio.get_running_loop()
                    self._timer = loop.call_later(self._wait_s, lambda: self._start(forced=True))
                return
            executor, budget = place
            items = self._take(budget)
            if not items:
                return
            # Texts of one length are computed together.
            items.sort(key=lambda item: len(item.row))
            rows = [item.row for item in items]
            loop = asyncio.get_running_loop()
            begun = time.monotonic()
            future = loop.run_in_executor(executor, self._compute, rows)
            self._running[future] = _Batch(items, begun, executor is self._threads.shares)
            future.add_done_callback(self._finish)

    def _place(self) -> tuple[Executor, int] | None:
        """Where the next batch is computed, and the tokens that it may have; None: nowhere yet."""
        threads, running = self._threads, len(self._running)
        if not running and (threads.count == 1 or self._queued <= self._tokens_per_batch):
            return threads.whole, self._tokens_per_batch
        if running == threads.count or any(not b.in_share for b in self._running.values()):
            return None
        # What waits is shared out evenly, or the last one would keep all others waiting.
        share = math.ceil(self._queued / (threads.count - running))
        return threads.shares, min(self._tokens_per_batch, share)

    def _take(self, budget: int) -> list[_Item]:
        """The rows from the head of the queue that fit into a batch; at least one."""
        batch: list[_Item] = []
        tokens = 0
        while self._items:
            item = self._items[0]
            if item.request.future.done():  # nobody waits for it any more
                self._items.popleft()
                continue
            cost = _cost(item.row)
            if batch and tokens + cost > budget:
                break
            self._items.popleft()
            batch.append(item)
            tokens += cost
            item.request.waiting -= cost
            self._queued -= cost
        return batch

    def _finish(self, future: asyncio.Future[Scores]) -> None:
        beside = len(self._running)  # batches, this one among them
        items, begun, _ = self._running.pop(future)
        seconds = max(1e-9, time.monotonic() - begun)
        self._start(forced=False)  # before answers are handed out: the thread must not wait
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if error is None:
            tokens = sum(_cost(item.row) for item in items)
            self._note_speed(tokens, seconds / beside)
            self._on_batch(len(items), tokens, seconds)
            scores = future.result()
        for row, item in enumerate(items):
            request = item.request
            if request.future.done():
                continue
            if error is not None:
                request.future.set_exception(Failed(error))
                continue
            request.scores[item.place] = scores[row]
            request.missing -= 1
            if not request.missing:
                request.future.set_result(np.stack(request.scores))

    def _note_speed(self, tokens: int, seconds: float) -> None:
        """Follow the speed; small batches, which are slow for their size, say little about it."""
        speed = tokens / seconds
        before = speed if self._speed is None else self._speed
        weight = _MEMORY * min(1.0, tokens / self._tokens_per_batch)
        self._speed = (1 - weight) * before + weight * speed


def _cost(row: Row) -> int:
    """The tokens of a row; one of which nothing is left counts, too."""
    return max(1, len(row))
