"""Folders of this machine for as long as a process needs them.

Only their owner can enter them. A process that is killed leaves them; the next one deletes them. A
folder is in use while its process holds the lock on a file in it, which the kernel releases when
the process ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raybert.cluster import interrupts
from raybert.cluster.file_lock import lock_file

#: Ray's session, HAProxy's files, a job's package, a benchmark's data; short, since the path of a
#: socket has 107 bytes at most.
PREFIXES = ("rbr-", "rbs-", "rbj-", "rbb-")
_LOCK = "lock"
_UNLOCKED_S = 86_400  # the age at which a folder without a lock is a leftover of an old version


@contextmanager
def scratch_folder(prefix: str, parent: Path, *, has_logs: bool = False) -> Iterator[Path]:
    """Make a folder with one of PREFIXES, and delete it at the end.

    If it `has_logs`, which an error's message may name, it stays after an error, until the next
    process makes a folder.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = _take_lock(folder)
    forget = interrupts.at_end(lambda: shutil.rmtree(folder, ignore_errors=True))
    stays = False
    try:
        yield folder
    except Exception:  # not Ctrl-C
        stays = has_logs
        raise
    finally:
        if not stays:
            shutil.rmtree(folder, ignore_errors=True)
        forget()
        os.close(lock)


def sweep(parent: Path) -> None:
    """Delete this user's folders whose processes have ended."""
    with suppress(OSError):
        for folder in parent.iterdir():
            if folder.name.startswith(PREFIXES):
                with suppress(OSError):
                    _delete_unused(folder)


def _delete_unused(folder: Path) -> None:
    about = folder.lstat()  # a link is another one's
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        return
    try:  # O_NONBLOCK: a FIFO of that name would wait for a writer
        lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:  # just being made, unless it is old
        if time.time() - about.st_mtime > _UNLOCKED_S:
            shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        lock_file(lock, wait=False)  # OSError: in use
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _take_lock(folder: Path) -> int:
    """Lock a folder; the file gets its name once it is locked, so nobody else takes the lock."""
    made = folder / f".{_LOCK}"
    lock = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    lock_file(lock)
    made.rename(folder / _LOCK)
    return lock
