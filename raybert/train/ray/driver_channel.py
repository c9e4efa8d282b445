"""What the driver and the workers of a run tell each other: progress, a fatal error, "stop".

It is kept in the key-value store of Ray's head, not in an actor: an actor would be one more process
that wakes a hundred times a second, and would be lost with the node that it happens to be on.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_NAMESPACE = b"raybert"
_SECONDS = 0.5  # between two looks of a worker
_CLOSE_SECONDS = 5.0


class DriverChannel:
    """A run's place in the store. Picklable: it travels to the workers."""

    def __init__(self) -> None:
        """Name a new one; nothing is written yet."""
        self._prefix = f"board-{uuid.uuid4().hex}/"

    def put(self, record: str, place: tuple[int, int]) -> None:
        """Add a record of progress, as JSON; `place`, (attempt, number), orders it among others."""
        attempt, number = place
        self._put(f"record/{attempt:06d}-{number:09d}", record.encode())

    def take(self) -> Iterator[dict[str, Any]]:
        """Yield the records since the last call; each is removed before the next is read."""
        from ray.experimental import internal_kv as kv

        prefix = f"{self._prefix}record/".encode()
        for key in sorted(kv._internal_kv_list(prefix, namespace=_NAMESPACE)):
            record = json.loads(kv._internal_kv_get(key, namespace=_NAMESPACE))
            kv._internal_kv_del(key, namespace=_NAMESPACE)
            yield record

    def begin(self, attempt: int) -> None:
        """Say which attempt is at work now; a restart's is younger."""
        self._put("attempt", str(attempt).encode())

    def attempt(self) -> int:
        """The attempt that is at work; 0 before the first one."""
        return int(self._get("attempt") or 0)

    def fail(self, error: Exception) -> None:
        """Report an error that no restart mends; the first one stays."""
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

    def tell(self, event: str, message: str, step: int) -> None:
        """Add an event to the records, between those of the attempt at work and of the next."""
        record = {"kind": "event", "step": step, "event": event, "message": message}
        self.put(json.dumps(record), (self.attempt(), 900_000_000 + int(time.time()) % 90_000_000))

    def ask_to_save(self) -> None:
        """Ask for a checkpoint now; once for every call."""
        self._put("save", uuid.uuid4().bytes)

    def asked_to_save(self) -> bytes | None:
        """What tells the last wish for a checkpoint from those before; None where there is none."""
        return self._get("save")

    def is_over(self) -> bool:
        """Whether there is nothing to do for a worker that starts now."""
        return self.is_stopping() or self._get("error") is not None

    def clear(self) -> None:
        """Remove all that was written."""
        from ray.experimental import internal_kv as kv

        kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)

    def _put(self, name: str, value: bytes, overwrite: bool = True) -> None:
        from ray.experimental import internal_kv as kv

        kv._internal_kv_put(self._prefix + name, value, overwrite, namespace=_NAMESPACE)

    def _get(self, name: str) -> bytes | None:
        from ray.experimental import internal_kv as kv

        value: bytes | None = kv._internal_kv_get(self._prefix + name, namespace=_NAMESPACE)
        return value


class WorkerChannel:
    """Rank 0's link to the board. Neither way costs a step any time."""

    def __init__(self, board: DriverChannel, attempt: int) -> None:
        """Listen from now on."""
        self._board, self._attempt = board, attempt
        self._records: deque[str] = deque()
        self._sent = 0
        self._stopping, self._closed = threading.Event(), threading.Event()
        self._saving = threading.Event()
        self._heard: bytes | None = None  # the last wish for a checkpoint
        self._thread = threading.Thread(target=self._talk, name="board", daemon=True)
        self._thread.start()

    def report(self, record: dict[str, Any]) -> None:
        """Send a record of progress, within half a second."""
        self._records.append(json.dumps(record))

    def is_stopping(self) -> bool:
        """Whether the driver asked to stop, as of half a second ago."""
        return self._stopping.is_set()

    def is_asked_to_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked = self._saving.is_set()
        if asked:  # else one that comes just now would be forgotten
            self._saving.clear()
        return asked

    def close(self) -> None:
        """Send what is left; give up after some seconds where Ray's head does not answer."""
        self._closed.set()
        self._thread.join(_CLOSE_SECONDS)

    def _talk(self) -> None:
        closing = False
        while not closing or self._records:
            closing = self._closed.wait(_SECONDS)
            # The head may be away for a while: progress can wait, and training goes on.
            with suppress(Exception):
                if self._board.is_stopping():
                    self._stopping.set()
                asked = self._board.asked_to_save()
                if asked != self._heard:
                    self._heard = asked
                    self._saving.set()
            with suppress(Exception):
                self._send()

    def _send(self) -> None:
        while self._records:
            self._board.put(self._records[0], (self._attempt, self._sent))
            self._records.popleft()
            self._sent += 1
