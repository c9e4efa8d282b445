"""Retry what fails because a storage fails for a while.

Not tenacity: none of its stop conditions knows how long the last try took. Other ranks wait while
this one retries, and time out, so the limit must hold even if the next try takes as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from raybert.errors import StorageError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds between tries

T = TypeVar("T")


def retry(
    action: Callable[[], T], seconds: float, on_event: Callable[[str], None] = lambda message: None
) -> T:
    """Call `action` until it raises no StorageError, with pauses that double; return its result.

    `seconds` are not exceeded if the next try takes as long as the last one; 0 is one try. The last
    StorageError is raised. `on_event` gets a line about the first failure.
    """
    until, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        begun = time.monotonic()
        try:
            return action()
        except StorageError as error:
            now = time.monotonic()
            left = until - now - (now - begun)
            if left <= 0:
                raise
            if pause == _FIRST_PAUSE:
                on_event(f"{error}; retrying for up to {left:.0f} s")
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
