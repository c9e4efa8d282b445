"""Run what does not profit from batching, such as explanations and masks, one task at a time.

A request holds one slot from its first task to its last, so that an accepted request is not
rejected halfway; the tasks of several requests alternate. A running task can't be stopped, but a
request that is cancelled leaves its other tasks undone: tasks should be short.

All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from raybert.errors import RaybertError
from raybert.serve.runtime.batching import ModelFailed, Overloaded

T = TypeVar("T")

_NEWEST_WEIGHT = 0.2  # of the last request in the moving average of seconds per request


class Slot:
    """A request's place among those that wait or run; made by `SerialExecutor.reserve`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.last: Future[Any] | None = None  # the task that was submitted last
        self.seconds = 0.0  # spent on the request's tasks

    async def run(self, work: Callable[[], T]) -> T:
        """Run a task.

        Raises:
            RaybertError: the task raised it.
            ModelFailed: the task raised it, or any other exception.
        """
        self.last = future = self._executor.submit(self._timed, work)
        try:
            return await asyncio.wrap_future(future)
        except (RaybertError, ModelFailed):
            raise
        except Exception as error:
            raise ModelFailed(error) from error

    def _timed(self, work: Callable[[], T]) -> T:
        begun = time.monotonic()
        try:
            return work()
        finally:
            self.seconds += time.monotonic() - begun


class SerialExecutor:
    """Accepts a limited number of requests."""

    def __init__(self, executor: Executor, max_requests: int) -> None:
        """Set up; the executor has one thread, and `max_requests` may wait or run."""
        self._executor, self._max_requests = executor, max_requests
        self._count = 0
        self._seconds = 0.5  # moving average per request

    @contextmanager
    def reserve(self) -> Iterator[Slot]:
        """Reserve a slot for a request.

        Raises:
            Overloaded: all are in use.
        """
        if self._count >= self._max_requests:
            raise Overloaded(self._count * self._seconds)
        self._count += 1
        slot, loop = Slot(self._executor), asyncio.get_running_loop()
        try:
            yield slot
        finally:
            if slot.last is None:
                self._count -= 1
            else:  # a running task holds the slot until its end, also when the request is cancelled
                slot.last.add_done_callback(lambda done: self._release_soon(loop, slot))

    def _release_soon(self, loop: asyncio.AbstractEventLoop, slot: Slot) -> None:
        def release() -> None:
            self._count -= 1
            if slot.seconds:  # 0: the request was cancelled before its first task began
                self._seconds += _NEWEST_WEIGHT * (slot.seconds - self._seconds)

        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(release)
