"""Two clients that send requests continuously, and the failures of each.

One never retries (`load.py`): every failure of the server is counted. The other is raybert's own
client with its defaults.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import load
from servers import Server, shipped_client

RETRYING = 4  # threads with raybert's client
ENDLESS = 24 * 3600  # seconds: the load ends when the faults do
#: After a kill: the dying process may still accept requests, because its memory is freed before its
#: connections are closed.
DYING_SECONDS = 0.5

Failure = tuple[float, float, int]  # sent, answered (Unix time), status


class Shipped(threading.Thread):
    """Sends requests continuously through raybert's client, and records its errors."""

    def __init__(self, url: str, texts: Sequence[str], seed: int) -> None:
        super().__init__(daemon=True)
        self._ask, self._texts, self._rng = shipped_client(url), texts, random.Random(seed)
        self.over = threading.Event()
        self.answered = 0
        self.lost: list[str] = []

    def run(self) -> None:
        """Send requests until `over` is set."""
        while not self.over.is_set():
            try:
                self._ask(self._rng.choice(self._texts))
                self.answered += 1
            except Exception as error:  # noqa: BLE001 - any error is a lost request
                self.lost.append(f"{type(error).__name__}: {error}"[:200])


class Clients:
    """A context in which both clients send requests; afterwards `got` has their results.

    Every response but 200 counts as lost, 429 included: 32 connections are no overload.
    """

    def __init__(self, server: Server, file: Path, connections: int) -> None:
        texts = json.loads(file.read_text(encoding="utf-8"))
        self._url, self._file = f"{server.url}/predict", file
        self._shipped = [Shipped(server.url, texts, seed) for seed in range(RETRYING)]
        self.got: dict[str, Any] = {"connections": connections}

    def __enter__(self) -> Clients:
        self._plain = load.begin(
            self._url,
            self._file,
            connections=self.got["connections"],
            seconds=ENDLESS,
            warmup=0,
            expected="200",
        )
        for thread in self._shipped:
            thread.start()
        return self

    def __exit__(self, *rest: object) -> None:
        for thread in self._shipped:
            thread.over.set()
        self._plain.terminate()  # it prints its results so far
        plain = load.end(self._plain)
        for thread in self._shipped:
            thread.join()
        keys = ("statuses", "failed", "failures", "hung")
        self.got |= {
            "never_retries": {
                "lost": plain["failed"] + plain["hung"],
                **{key: plain[key] for key in keys},
            },
            "shipped": {
                "answered": sum(thread.answered for thread in self._shipped),
                "lost": [error for thread in self._shipped for error in thread.lost],
            },
        }


def in_flight(failures: Sequence[Failure], struck: float) -> int:
    """The number of failed requests that were in flight when a replica was killed."""
    dead = struck + DYING_SECONDS
    return sum(sent <= dead and answered >= struck for sent, answered, _ in failures)


def otherwise(failures: Sequence[Failure], kills: Sequence[float]) -> int:
    """The number of failed requests that were in flight at none of the kills."""
    return sum(not any(in_flight([one], struck) for struck in kills) for one in failures)
