"""Work that no batch helps, such as explanations and masks: one piece at a time in a thread.

A request has one place from its first piece to its last, so that what is let in is not refused in
the middle; between its pieces others have their turn. Nobody can end a piece that has begun, but
whoever goes away leaves those that have not: pieces should be short.

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
from raybert.serve.runtime.batching import Failed, Overloaded

T = TypeVar("T")

_MEMORY = 0.2  # weight of the newest request in the seconds that waiting is judged by


class Turn:
    """A request's place; made by `Aside.turn`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.last: Future[Any] | None = None  # the piece that was handed over last
        self.seconds = 0.0  # spent on its pieces

    async def run(self, work: Callable[[], T]) -> T:
        """Do a piece of work.

        Raises:
            RaybertError: the work's own.
            Failed: its own, or it raised anything else.
        """
        self.last = future = self._executor.submit(self._timed, work)
        try:
            return await asyncio.wrap_future(future)
        except (RaybertError, Failed):
            raise
        except Exception as error:
            raise Failed(error) from error

    def _timed(self, work: Callable[[], T]) -> T:
        begun = time.monotonic()
        try:
            return work()
        finally:
            self.seconds += time.monotonic() - begun


class SerialExecutor:
    """Lets requests in, as long as few wait."""

    def __init__(self, executor: Executor, most: int) -> None:
        """Set up; the executor has one thread, and `most` is how many requests may wait or run."""
        self._executor, self._most = executor, most
        self._count = 0
        self._seconds = 0.5  # of a request, by those that have ended

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Take a place for a request.

        Raises:
            Overloaded: too many wait.
        """
        if self._count >= self._most:
            raise Overloaded(self._count * self._seconds)
        self._count += 1
        turn, loop = Turn(self._executor), asyncio.get_running_loop()
        try:
            yield turn
        finally:
            if turn.last is None:
                self._count -= 1
            else:  # what was begun goes on, even if nobody waits any more, and counts until its end
                turn.last.add_done_callback(lambda done: self._forget(loop, turn))

    def _forget(self, loop: asyncio.AbstractEventLoop, turn: Turn) -> None:
        def forget() -> None:
            self._count -= 1
            if turn.seconds:  # else it went away before its first piece began
                self._seconds += _MEMORY * (turn.seconds - self._seconds)

        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(forget)
