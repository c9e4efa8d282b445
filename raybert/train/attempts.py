"""Attempts at a run: each start registers a number of its own, and only the youngest may commit."""

from __future__ import annotations

from raybert.errors import Superseded
from raybert.storage.exclusive import numbers_taken, take_number
from raybert.storage.folder import Folder
from raybert.storage.retry import retry


def begin_attempt(run: Folder, retry_timeout_s: float = 0.0) -> int:
    """Register a new attempt at a run and return its number; older attempts may not commit now.

    Args:
        run: the run's folder.
        retry_timeout_s: seconds for which a storage that refuses is tried again; giving up costs
            another start of all workers.

    Raises:
        StorageError: the storage refused for that long.
    """
    return retry(lambda: take_number(run / "attempts"), retry_timeout_s)


def check_attempt(run: Folder, attempt: int) -> None:
    """Make sure that no younger attempt at the run exists.

    Raises:
        Superseded: there is one.
    """
    youngest = max(numbers_taken(run / "attempts"), default=attempt)
    if youngest > attempt:
        raise Superseded(f"{run}: attempt {youngest} has taken over; attempt {attempt} ends here")
