"""What becomes of a served application, while the command line waits: told in a line each time.

Serve replaces replicas that die without a word. Where none can come back, which is what running out
of memory or a storage that is gone leads to, a process that waits on would hide it from whoever
restarts processes: it ends with an error.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from raybert.errors import RaybertError

LOOK_S = 5.0  # between two looks
_SILENT_S = 30.0  # that a look may take
GIVE_UP_S = 300.0  # without a replica: several starts, of a minute each
_MISSING = 3  # looks that do not find it: a controller may be about to come back
_AGAIN_S = 60.0  # between two lines of one trouble whose reason changes


class State(NamedTuple):
    """How an application is."""

    running: int  # replicas that answer
    trouble: str  # what Serve complains of, in a line; empty: of nothing


class Watch:
    """Tells of changes; `note` is given one state after the other."""

    def __init__(self, tell: Callable[[str], None], *, give_up_s: float = GIVE_UP_S) -> None:
        """Set up.

        Args:
            tell: is given a line where something has changed.
            give_up_s: seconds without a replica after which it is given up.
        """
        self._tell, self._give_up_s = tell, give_up_s
        self._seen, self._told_at = State(1, ""), 0.0
        self._down_since: float | None = None
        self._missing = 0  # looks in a row that did not find it

    def note(self, state: State | None, now: float) -> None:
        """Take note of a state; None: the application is not there any more.

        Args:
            state: as it is.
            now: in seconds, of any clock that only rises.

        Raises:
            RaybertError: there has been no replica for too long, or somebody took it away.
        """
        self._missing = self._missing + 1 if state is None else 0
        if self._missing >= _MISSING:
            raise RaybertError("the application was taken away from Ray Serve; serve it again")
        if state is None:
            return
        if state.running == 0 and not state.trouble:
            state = State(0, "no replica runs")
        was_well, is_well = not self._seen.trouble, not state.trouble
        is_other = (was_well, self._seen.running == 0) != (is_well, state.running == 0)
        is_new = not is_well and self._seen.trouble != state.trouble
        if is_other or (is_new and now >= self._told_at + _AGAIN_S):
            self._tell(_line(state))
            self._seen, self._told_at = state, now
        if state.running:
            self._down_since = None
            return
        self._down_since = now if self._down_since is None else self._down_since
        if now - self._down_since >= self._give_up_s:
            raise RaybertError(
                f"no replica has answered for {now - self._down_since:.0f} s: {state.trouble}"
            )


def watch(look: Callable[[], State | None], tell: Callable[[str], None]) -> None:
    """Look at an application again and again.

    Args:
        look: asks Serve; it may raise anything, or not return.
        tell: is given a line where something has changed.

    Raises:
        RaybertError: there has been no replica for too long, or somebody took it away.
    """
    seen = Watch(tell)
    while True:
        time.sleep(LOOK_S)
        seen.note(_looked(look), time.monotonic())


def reason(message: str) -> str:
    """What a replica said in our words, out of the traceback that Serve wraps it in."""
    ours = re.findall(r"raybert\.errors\.\w+: (.+)", message)
    if ours:
        return str(ours[-1]).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"Ray Serve: {lines[-1] if lines else 'no reason given'}"


def _line(state: State) -> str:
    number = f"{state.running} replica{'' if state.running == 1 else 's'}"
    answers = f"{number} answer{'s' if state.running == 1 else ''}"
    return f"in trouble, {answers}: {state.trouble}" if state.trouble else f"well again, {answers}"


def _looked(look: Callable[[], State | None]) -> State | None:
    """One look, for as long as it may take: a controller that is gone does not answer."""
    found: queue.Queue[State | None] = queue.Queue()

    def put() -> None:
        try:
            found.put(look())
        except Exception as error:  # of Ray's many
            found.put(State(0, f"Ray Serve does not answer: {type(error).__name__}"))

    threading.Thread(target=put, name="look", daemon=True).start()
    try:
        return found.get(timeout=_SILENT_S)
    except queue.Empty:
        return State(0, f"Ray Serve has not answered for {_SILENT_S:.0f} s")
