"""A lock on an open file, which the system releases when its process ends."""

from __future__ import annotations

import sys


def lock_file(descriptor: int, *, wait: bool = True) -> None:
    """Take an exclusive lock; an OSError if another process has it and `wait` is false."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
