"""Read a job's log while it grows, in a thread.

The client of Ray is asynchronous, and asyncio turns Ctrl-C into a cancellation that other code may
swallow or convert. A thread reads the stream into a queue and the caller waits for the queue, so
Ctrl-C raises KeyboardInterrupt there and nowhere else.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

_JOIN_SECONDS = 5.0  # the thread closes its connection in this time


def read_stream(
    open_stream: Callable[[], AsyncIterator[str]], timeout_s: float
) -> Iterator[str | None]:
    """Yield the chunks of a stream, and None after the last one; raises what the stream raises.

    Ends without None when no chunk has arrived for `timeout_s` seconds: after a laptop has slept, a
    dead connection gives no error.
    """
    chunks: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()

    async def read() -> None:
        async for chunk in open_stream():
            chunks.put(chunk)

    task = loop.create_task(read())

    def run() -> None:
        try:
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
            chunks.put(None)
        except Exception as error:
            chunks.put(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=run, name="job-log", daemon=True)
    thread.start()
    try:
        while True:
            try:
                chunk = chunks.get(timeout=timeout_s)
            except queue.Empty:
                return
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
            if chunk is None:
                return
    finally:
        with suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(task.cancel)
        thread.join(_JOIN_SECONDS)
