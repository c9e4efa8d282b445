"""Run Ray Train's or Ray Tune's `fit` in a thread, so that the main thread can handle Ctrl-C.

In the main thread both install their own SIGINT handler: Train's kills the workers without a
checkpoint, exits with status 0 and is never removed; Tune's gives the trials five seconds to end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from raybert.train.ray.driver_channel import DriverChannel

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60  # after Ctrl-C, for the current step and its checkpoint


def run_fit(
    fit: Callable[[], Any],
    channel: DriverChannel,
    poll: Callable[[], None],
    *,
    on_interrupt: Callable[[], None] = lambda: None,
) -> Exception | None:
    """Run `fit` in a thread and call `poll` twice a second and once after it has returned.

    What `poll` raises ends the wait, not the thread. On Ctrl-C, `on_interrupt` is called and then
    the workers are asked to stop through `channel`, which is cleared when `fit` has returned.

    Returns:
        The exception that `fit` raised, None if it succeeded.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the workers have saved a checkpoint.
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
        is_finished = False
        while not is_finished:
            is_finished = finished.wait(_POLL_SECONDS)
            poll()
    except KeyboardInterrupt:
        on_interrupt()
        with suppress(Exception):  # if Ray's head is gone, so are the workers
            channel.stop()
        finished.wait(_GRACE_SECONDS)  # a second Ctrl-C ends this wait
        raise
    finally:
        if finished.is_set():  # else remaining workers must still find the stop or the error
            with suppress(Exception):
                channel.clear()
    return errors[0] if errors else None
