"""The memory of a local Ray: all processes' PSS without shared memory, plus the object store."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil


class Meter(threading.Thread):
    """Samples the memory of this process and its descendants, a local Ray included."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop, self.peak = threading.Event(), 0

    def run(self) -> None:
        """Sample four times a second until `stop` is set."""
        while not self.stop.wait(0.25):
            me = psutil.Process()
            private = sum(map(private_pss, [me.pid, *(c.pid for c in me.children(recursive=True))]))
            self.peak = max(self.peak, private + plasma_in_use(me))


def private_pss(pid: int) -> int:
    """The PSS of a process without shared memory, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return (sizes["Pss:"] - sizes.get("Pss_Shmem:", 0)) * 1024


def plasma_in_use(me: psutil.Process) -> int:
    """The object store's memory in use, in bytes: an unlinked file that the raylet keeps open."""
    for child in me.children(recursive=True):
        if child.name() == "raylet":
            for link in Path(f"/proc/{child.pid}/fd").iterdir():
                try:
                    if "plasma" in os.readlink(link):
                        return os.stat(link).st_blocks * 512
                except OSError:
                    continue
    return 0
