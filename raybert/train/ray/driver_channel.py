"""Messages between the driver and the workers of a run: progress, a fatal error, "stop", "save".

They are kept in the key-value store of Ray's head, not in an actor: an actor would be one more
process that wakes a hundred times a second, and would be lost with the node that it is on.
`run_fit` is the driver's side: it waits for the workers and handles Ctrl-C.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from raybert.cluster.internals import core
from raybert.cluster.interrupts import deferred, end
from raybert.records import EventName, EventRecord

_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 5.0
_LAST = 999_999_999  # the number of a driver's event, after all records of its attempt
_START_SECONDS = 2.0  # for a checkpoint before the first record: hardly a step was taken


class DriverChannel:
    """A run's keys in the store. Picklable: it is sent to the workers."""

    def __init__(self) -> None:
        self._prefix = f"channel-{uuid.uuid4().hex}/"
        self.has_progress = False  # on the driver: whether a worker has sent a record

    def send(self, record: str, position: tuple[int, int], suffix: str = "") -> None:
        """Add a record of progress, as JSON; `position`, (attempt, number), orders the records.

        Records of one position need different suffixes.
        """
        attempt, number = position
        self._put(f"record/{attempt:06d}-{number:09d}{suffix}", record.encode())

    def receive(self) -> Iterator[Any]:
        """Yield the records since the last call; each is removed before the next is read."""
        for key in core.kv_list(f"{self._prefix}record/"):
            record = json.loads(core.kv_get(key) or b"")
            self.has_progress |= record.get("kind") != "event"  # such as "waiting for nodes"
            core.kv_delete(key)
            yield record

    def send_event(self, event: EventName, message: str, step: int) -> None:
        """Add an event after the current attempt's records and before those of the next."""
        record: EventRecord = {"kind": "event", "step": step, "event": event, "message": message}
        suffix = f"-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self.send(json.dumps(record), (self.attempt(), _LAST), suffix)

    def begin(self, attempt: int) -> None:
        """Write which attempt is running; a restart's number is higher."""
        self._put("attempt", str(attempt).encode())

    def attempt(self) -> int:
        """The attempt that is running; 0 before the first one."""
        return int(self._get("attempt") or 0)

    def fail(self, error: Exception) -> None:
        """Report an error that no restart fixes; the first one is kept."""
        from ray import cloudpickle

        self._put("error", cloudpickle.dumps(error), overwrite=False)

    def error(self) -> Exception | None:
        """The fatal error, if there is one."""
        from ray import cloudpickle

        pickled = self._get("error")
        error: Exception | None = cloudpickle.loads(pickled) if pickled else None
        return error

    def stop(self) -> None:
        """Ask the workers to stop after a checkpoint."""
        self._put("stop", b"1")

    def is_stopping(self) -> bool:
        """Whether the workers should stop."""
        return self._get("stop") is not None

    def request_save(self) -> None:
        """Ask for a checkpoint now; every call asks for one more."""
        self._put("save", uuid.uuid4().bytes)

    def save_request(self) -> bytes | None:
        """An id of the last request for a checkpoint; None where there is none."""
        return self._get("save")

    def is_over(self) -> bool:
        """Whether a worker that starts now should return at once."""
        return self.is_stopping() or self._get("error") is not None

    def clear(self) -> None:
        """Delete all that was written."""
        core.kv_delete(self._prefix, is_prefix=True)

    def _put(self, name: str, value: bytes, overwrite: bool = True) -> None:
        core.kv_put(self._prefix + name, value, overwrite)

    def _get(self, name: str) -> bytes | None:
        return core.kv_get(self._prefix + name)


class WorkerChannel:
    """Rank 0's end of a DriverChannel: a thread sends and polls, so that no step waits for it."""

    def __init__(self, channel: DriverChannel, attempt: int) -> None:
        self._channel, self._attempt = channel, attempt
        self._records: deque[str] = deque()
        self._sent = 0
        self._stopping, self._closed = threading.Event(), threading.Event()
        self._saving = threading.Event()
        self._save_request: bytes | None = None  # the last one that was seen
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        self._thread.start()

    def report(self, record: Mapping[str, Any]) -> None:
        """Send a record of progress, within half a second."""
        self._records.append(json.dumps(record))

    def is_stopping(self) -> bool:
        """Whether the driver asked to stop, as of half a second ago."""
        return self._stopping.is_set()

    def is_save_requested(self) -> bool:
        """Whether a checkpoint was requested since the last call."""
        is_requested = self._saving.is_set()
        if is_requested:  # else a request that arrives just now would be lost
            self._saving.clear()
        return is_requested

    def close(self) -> None:
        """Send what is left; give up after 5 s where Ray's head does not answer."""
        self._closed.set()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        closing = False
        while not closing or self._records:
            closing = self._closed.wait(_POLL_SECONDS)
            # The head may be away for a while: records wait, and training continues.
            with suppress(Exception):
                self._poll()
            with suppress(Exception):
                self._send()

    def _poll(self) -> None:
        if self._channel.is_stopping():
            self._stopping.set()
        request = self._channel.save_request()
        if request != self._save_request:
            self._save_request = request
            self._saving.set()

    def _send(self) -> None:
        while self._records:
            self._channel.send(self._records[0], (self._attempt, self._sent))
            self._records.popleft()
            self._sent += 1


def _clear_if(is_finished: bool, channel: DriverChannel) -> None:
    """Clear a channel, unless remaining workers must still find the stop or the error."""
    if is_finished:
        with suppress(Exception):
            channel.clear()


def run_fit(
    fit: Callable[[], Any],
    channel: DriverChannel,
    poll: Callable[[], None],
    *,
    on_interrupt: Callable[[], None] = lambda: None,
) -> Exception | None:
    """Run Ray Train's or Ray Tune's `fit` in a thread; return the exception that it raised, if any.

    In the main thread both install their own SIGINT handler: Train's kills the workers without a
    checkpoint, exits with status 0 and is never removed; Tune's gives the trials five seconds.
    Here Ctrl-C calls `on_interrupt`, asks the workers to stop through `channel`, waits for their
    checkpoint, however long a slow storage takes, and raises KeyboardInterrupt; where they still
    start, it ends the process. `poll` is
    called twice a second and once after `fit` has returned; what it raises ends the wait, not the
    thread.
    """
    errors: list[Exception] = []
    # An event, because a `join` that Ctrl-C interrupts marks the thread as ended (CPython 3.11).
    finished = threading.Event()

    def run() -> None:
        try:
            fit()
        except Exception as error:
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=run, name="fit", daemon=True).start()
    try:
        with deferred() as interrupted:
            is_finished = False
            while not is_finished and not interrupted.is_set():
                is_finished = finished.wait(_POLL_SECONDS)
                poll()
    except KeyboardInterrupt:
        on_interrupt()
        with suppress(Exception):  # if Ray's head is gone, so are the workers
            channel.stop()
        if not channel.has_progress:
            finished.wait(_START_SECONDS)
            _clear_if(finished.is_set(), channel)
            end()
        while not finished.wait(_POLL_SECONDS):  # a second Ctrl-C ends this
            poll()
        raise
    finally:
        _clear_if(finished.is_set(), channel)
    return errors[0] if errors else None
