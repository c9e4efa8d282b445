"""Two clients that ask a server without pause, and what each of them did not get.

One never retries (`load.py`): what it loses was lost by the server. The other one is the client
that raybert ships, as a user has it.
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

RETRYING = 4  # threads that ask through the shipped client
ENDLESS = 24 * 3600  # seconds: the load ends when the faults do
#: After a kill, for which a process that is going down may still take requests: its memory is given
#: back before its connections are closed.
DYING_SECONDS = 0.5

Failure = tuple[float, float, int]  # sent, answered (Unix time), status


class Shipped(threading.Thread):
    """Asks without pause through the client that raybert ships, and counts what it can't get."""

    def __init__(self, url: str, texts: Sequence[str], seed: int) -> None:
        super().__init__(daemon=True)
        self._ask, self._texts, self._rng = shipped_client(url), texts, random.Random(seed)
        self.over = threading.Event()
        self.answered = 0
        self.lost: list[str] = []

    def run(self) -> None:
        """Ask until told to stop."""
        while not self.over.is_set():
            try:
                self._ask(self._rng.choice(self._texts))
                self.answered += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, the answer is lost
                self.lost.append(f"{type(error).__name__}: {error}"[:200])


class Clients:
    """Both clients at work for as long as the context lasts; then `got` has what they got.

    All that is not answered with 200 is lost, refusals (429) among it: 32 connections are no
    overload.
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
        self._plain.terminate()  # it ends with what came until now
        plain = load.end(self._plain)
        for thread in self._shipped:
            thread.join()
        told = ("statuses", "failed", "failures", "hung")
        self.got |= {
            "never_retries": {
                "lost": plain["failed"] + plain["hung"],
                **{key: plain[key] for key in told},
            },
            "shipped": {
                "answered": sum(thread.answered for thread in self._shipped),
                "lost": [error for thread in self._shipped for error in thread.lost],
            },
        }


def in_flight(failures: Sequence[Failure], struck: float) -> int:
    """How many of the requests that failed were under way when a replica was killed."""
    dead = struck + DYING_SECONDS
    return sum(sent <= dead and answered >= struck for sent, answered, _ in failures)


def otherwise(failures: Sequence[Failure], kills: Sequence[float]) -> int:
    """How many of the requests that failed were under way at none of the kills."""
    return sum(not any(in_flight([one], struck) for struck in kills) for one in failures)
