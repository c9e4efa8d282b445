"""Run explanations and masks, which do not profit from batching, one task at a time.

A request holds one slot from its first task to its last, so that an accepted request is not
rejected halfway; the tasks of several requests alternate. A running task can't be stopped, but the
others of a cancelled request are dropped: tasks should be short.

All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from raybert.errors import RaybertError
from raybert.inference.fill_mask import MaskFiller
from raybert.serve import request_errors
from raybert.serve.runtime.batching import ModelFailed, Overloaded, run_in_new_thread

T = TypeVar("T")

_NEWEST_WEIGHT = 0.2  # of the last request in the moving average of seconds per request
_MAX_TEXTS = 32  # of a request: each is a forward pass of its own
_MAX_PREDICTIONS = 10_000  # of a request, over all masks: 0.5 MB of response, some 10 ms of JSON

Filled = list[list[dict[str, Any]]]  # for each mask of a text its predictions: token, probability


class Slot:
    """A request's place among those that wait or run; made by `SerialExecutor.reserve`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.last: Future[Any] | None = None  # the task that was submitted last
        self.seconds = 0.0  # spent on the request's tasks

    async def run(self, work: Callable[[], T]) -> T:
        """Run a task; any exception but RaybertError becomes ModelFailed."""
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

    @property
    def fill(self) -> float:
        """The requests that wait or run, as a share of those that may."""
        return self._count / self._max_requests

    @contextmanager
    def reserve(self) -> Iterator[Slot]:
        """Reserve a slot for a request; Overloaded: all are in use."""
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


class NewThreadExecutor(Executor):
    """Runs one task after another, each in a new thread that ends with it."""

    def __init__(self, name: str, threads: int | None) -> None:
        self._threads, self._queue = threads, ThreadPoolExecutor(1, name)

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue a task."""
        return self._queue.submit(
            run_in_new_thread, functools.partial(work, *args, **kwargs), self._threads
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks."""
        self._queue.shutdown(wait, cancel_futures=cancel_futures)


async def fill_masks(
    mask_filler: MaskFiller,
    texts: Sequence[str],
    top_k: int,
    slot: Slot,
    targets: Sequence[str] | None = None,
) -> list[Filled]:
    """Return the `top_k` most probable tokens for each mask of each text, of `targets` if given.

    Raises:
        RequestError: 413, too many texts or predictions.
        DataError: a text has no mask, or is longer than the model reads.
        ModelFailed: the model raised an exception, or probabilities are not finite.
    """
    if len(texts) > _MAX_TEXTS:
        raise request_errors.too_large(
            f"{len(texts)} texts are more than the {_MAX_TEXTS} whose masks are filled in a request"
        )
    predictions = top_k * await slot.run(lambda: sum(map(mask_filler.count, texts)))
    if predictions > _MAX_PREDICTIONS:
        raise request_errors.too_large(
            f"{predictions:,} predictions are more than the {_MAX_PREDICTIONS:,} that are answered "
            "in a request; send fewer masks, or a smaller top_k"
        )
    options = {} if targets is None else {"targets": targets}
    return [
        await slot.run(functools.partial(_fill, mask_filler, text, top_k, **options))
        for text in texts
    ]


def _fill(mask_filler: MaskFiller, text: str, top_k: int, **options: Any) -> Filled:
    filled = mask_filler.fill(text, top_k, **options)
    if not all(math.isfinite(one["probability"]) for mask in filled for one in mask):
        raise ModelFailed(ValueError("scores are not finite: the weights have diverged"))
    return filled
