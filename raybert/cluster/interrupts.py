"""Ctrl-C and SIGTERM: they end the process at once, or where it says so after a checkpoint.

A signal handler that raises is not enough. Python drops exceptions in finalizers and callbacks, a
library may catch one, and an exception in the import of a C++ extension can crash the interpreter.
The handlers of the console script therefore do nothing. Python also writes each signal to a
descriptor, and a thread reads it there, even while the main thread waits inside C++.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from raybert.errors import INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WRITE_SECONDS = 1.0  # for standard error to accept the message

_is_installed = False
_message = ""
_deferred: list[threading.Event] = []  # of the contexts of `deferred`; the last is the innermost
_at_end: list[Callable[[], None]] = []


def install(message: str) -> None:
    """Handle both signals from now on; call it in the main thread, before other imports.

    A process in the background of a shell ignores Ctrl-C, and continues to.
    """
    global _is_installed
    say(message)
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_watch, args=(read,), name="interrupts", daemon=True).start()
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # Before its `exec` a child would write its own signals there.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ignore)
    _is_installed = True


def say(message: str) -> str:
    """Set the line that is printed where a signal ends the process at once; returns the last."""
    global _message
    before, _message = _message, message
    return before


def at_end(clean_up: Callable[[], None]) -> Callable[[], None]:
    """Call `clean_up` where a signal ends the process at once; returns what takes it back."""
    _at_end.append(clean_up)
    return lambda: _at_end.remove(clean_up)


@contextmanager
def deferred() -> Iterator[threading.Event]:
    """Make the first signal set an event, so that the context can end in order.

    KeyboardInterrupt is raised at the context's end. A second signal ends the process at once.
    Without `install`, in a program that is not ours, only Ctrl-C in the main thread is handled, and
    the second one has the effect that it has without this context.
    """
    event = threading.Event()
    if _is_installed:
        _deferred.append(event)
        try:
            yield event
        finally:
            _deferred.remove(event)
    elif threading.current_thread() is threading.main_thread():  # no other can handle signals
        before = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            event.set()
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield event
        finally:
            signal.signal(signal.SIGINT, before)
    else:
        yield event
    if event.is_set():  # also where nobody looked at it after the signal
        raise KeyboardInterrupt


def end() -> NoReturn:
    """End the process now, with the processes that it started; KeyboardInterrupt if not ours."""
    if not _is_installed:
        raise KeyboardInterrupt
    _print()
    with suppress(OSError):  # threads that lose their connection to Ray print tracebacks
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _kill_descendants()
    for clean_up in _at_end:
        with suppress(Exception):
            clean_up()
    os._exit(INTERRUPTED)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: `_watch` handles the signal."""


def _watch(descriptor: int) -> None:
    while True:
        for number in os.read(descriptor, 16):
            if number in _SIGNALS:
                if not _deferred or _deferred[-1].is_set():
                    end()
                _deferred[-1].set()


def _kill_descendants() -> None:
    """Kill the processes of a Ray that was started here: its replicas' own may outlive it."""
    psutil = sys.modules.get("psutil")  # before it is imported, nothing was started
    if psutil is None:
        return
    with suppress(Exception):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()


def _print() -> None:
    clear = "\r\x1b[2K" if os.isatty(2) else ""
    with suppress(OSError, ValueError):
        _, writable, _ = select.select([], [2], [], _WRITE_SECONDS)
        if writable:
            os.write(2, f"{clear}raybert: {_message}\n".encode())
