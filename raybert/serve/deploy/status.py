"""Watch a served application from the command line, and log its changes.

Serve replaces dead replicas without a message. If none can start again, because memory or a storage
is missing, `watch` raises, so that the supervisor of the process sees it.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from raybert.errors import RaybertError

POLL_S = 5.0
_POLL_TIMEOUT_S = 30.0
GIVE_UP_S = 300.0  # without a replica: enough for several starts of a minute each
_MAX_MISSING = 3  # polls in a row that do not find the application; a controller may be restarting
_LOG_INTERVAL_S = 60.0  # between two lines about a problem whose message changes


class State(NamedTuple):
    """The state of an application."""

    running: int  # replicas
    problem: str  # one line from Serve; empty: none


class Monitor:
    """Logs changes of the state; `update` gets one state after another."""

    def __init__(self, log: Callable[[str], None], *, give_up_s: float = GIVE_UP_S) -> None:
        self._log, self._give_up_s = log, give_up_s
        self._logged, self._logged_at = State(1, ""), 0.0
        self._down_since: float | None = None
        self._missing = 0  # polls in a row

    def update(self, state: State | None, now: float) -> None:
        """Process a state, None: the application was not found, at `now` of a monotonic clock.

        RaybertError: there has been no replica for too long, or the application was deleted.
        """
        self._missing = self._missing + 1 if state is None else 0
        if self._missing >= _MAX_MISSING:
            raise RaybertError("the application was deleted from Ray Serve; serve it again")
        if state is None:
            return
        if state.running == 0 and not state.problem:
            state = State(0, "no replica runs")
        before = self._logged
        is_change = (not before.problem, before.running == 0) != (
            not state.problem,
            state.running == 0,
        )
        is_new_problem = bool(state.problem) and before.problem != state.problem
        if is_change or (is_new_problem and now >= self._logged_at + _LOG_INTERVAL_S):
            self._log(_format_state(state))
            self._logged, self._logged_at = state, now
        if state.running:
            self._down_since = None
            return
        self._down_since = now if self._down_since is None else self._down_since
        if now - self._down_since >= self._give_up_s:
            raise RaybertError(
                f"no replica has answered for {now - self._down_since:.0f} s: {state.problem}"
            )


def watch(
    read_state: Callable[[], State | None],
    log: Callable[[str], None],
    stopping: threading.Event | None = None,
) -> None:
    """Poll an application until `stopping` is set or `Monitor.update` raises.

    `read_state` may raise or hang.
    """
    monitor, stopping = Monitor(log), stopping or threading.Event()
    while not stopping.wait(POLL_S):
        monitor.update(_poll(read_state), time.monotonic())


def extract_error(message: str) -> str:
    """Return the message of a replica's own error, out of the traceback that Serve reports."""
    errors = re.findall(r"raybert\.errors\.\w+: (.+)", message)
    if errors:
        return str(errors[-1]).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"Ray Serve: {lines[-1] if lines else 'no reason given'}"


def _format_state(state: State) -> str:
    replicas = f"{state.running} replica{'' if state.running == 1 else 's'} running"
    if state.problem:
        return f"unhealthy, {replicas}: {state.problem}"
    return f"healthy again, {replicas}"


def _poll(read_state: Callable[[], State | None]) -> State | None:
    """Read the state in a thread, with a time-out: calls to a dead controller hang."""
    result: queue.Queue[State | None] = queue.Queue()

    def read() -> None:
        try:
            result.put(read_state())
        except Exception as error:  # any of Ray's many types
            result.put(State(0, f"Ray Serve does not answer: {type(error).__name__}"))

    threading.Thread(target=read, name="poll", daemon=True).start()
    try:
        return result.get(timeout=_POLL_TIMEOUT_S)
    except queue.Empty:
        return State(0, f"Ray Serve has not answered for {_POLL_TIMEOUT_S:.0f} s")
