"""An HTTP load generator in its own process.

    python benchmarks/load.py http://127.0.0.1:8000/predict --texts texts.json --seconds 10

Writes HTTP/1.1 itself over asyncio streams: it shares two cores with the server, and the CPU time
of a client library would lower the server's figures. It never retries: a request whose connection
breaks is lost. Each connection sends its next request when the previous one is answered (closed
loop). With `--rate`, requests are sent on a schedule (open loop), and their latency counts from the
scheduled time. With `--at` it waits until a given time, so that one load can follow another without
a gap. Prints one JSON object; SIGTERM ends it early.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvloop

LOST = 0  # the status of a lost request
DRAIN_SECONDS = 60  # for responses that are outstanding at the end
PAUSE_SECONDS = 0.05  # after a lost request: a server that is down refuses connections at once
MAX_FAILURES = 1000  # listed in the result


class Answer(NamedTuple):
    """The outcome of a request; times in seconds."""

    at: float  # when it ended, since the load began
    latency: float
    status: int


class Connection:
    """A keep-alive connection, which is opened again after it broke."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        """Send a request and read the whole response; return the status, or LOST."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._where)
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = _header(head, b"content-length")
            closes = _header(head, b"connection") == b"close"
            await (reader.read() if length is None else reader.readexactly(int(length)))
        except (OSError, asyncio.IncompleteReadError):
            self._close()
            await asyncio.sleep(PAUSE_SECONDS)
            return LOST
        if closes:
            self._close()
        return int(head[9:12])

    def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _header(head: bytes, name: bytes) -> bytes | None:
    _, found, rest = head.partition(b"\r\n" + name + b":")
    return rest.partition(b"\r\n")[0].strip() if found else None


class Load:
    """Sends requests and records their outcomes."""

    def __init__(self, url: str, bodies: Iterator[bytes], seconds: float) -> None:
        where = urlsplit(url)
        self._host, self._port = where.hostname or "127.0.0.1", where.port or 80
        self._head = (
            f"POST {where.path or '/'} HTTP/1.1\r\nHost: {where.netloc}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._bodies = bodies
        self.answers: list[Answer] = []
        self.begun = time.monotonic()
        self.ends = self.begun + seconds
        self.waiting = 0  # requests in flight
        self.unsent = 0  # due while all connections were busy

    def connection(self) -> Connection:
        """A new connection to the server."""
        return Connection(self._host, self._port)

    async def one(self, connection: Connection, due: float) -> None:
        """Send the next request and record its outcome."""
        body = next(self._bodies)
        self.waiting += 1
        status = await connection.ask(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        now = time.monotonic()
        self.waiting -= 1
        self.answers.append(Answer(now - self.begun, now - due, status))

    async def closed_loop(self, connections: int) -> None:
        """Send a request on each connection when its previous one is answered."""

        async def send_all() -> None:
            connection = self.connection()
            while (now := time.monotonic()) < self.ends:
                await self.one(connection, now)

        await asyncio.gather(*(send_all() for _ in range(connections)))

    async def open_loop(self, rate: float, connections: int) -> None:
        """Send `rate` requests per second, over at most `connections` connections."""
        idle: list[Connection] = []
        made, running = 0, set()

        async def use(connection: Connection, due: float) -> None:
            await self.one(connection, due)
            idle.append(connection)

        due = time.monotonic()
        while due < self.ends:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while due <= min(time.monotonic(), self.ends):
                if not idle and made < connections:
                    idle.append(self.connection())
                    made += 1
                if idle:
                    task = asyncio.create_task(use(idle.pop(), due))
                    running.add(task)
                    task.add_done_callback(running.discard)
                else:
                    self.unsent += 1
                due += 1 / rate
        await asyncio.gather(*running)


def bodies_of(texts: Sequence[str], size: int) -> Iterator[bytes]:
    """Request bodies without end: one text each, or lists of `size` texts."""
    groups = [texts[i : i + size] for i in range(0, len(texts) - size + 1, size)]
    inputs = [group[0] if size == 1 else group for group in groups]
    made = [json.dumps({"inputs": one, "truncate": True}).encode() for one in inputs]
    return itertools.cycle(made)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The quantile of sorted values; None if there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def summary(load: Load, given: argparse.Namespace, hung: int) -> dict[str, Any]:
    """Summarize the responses between the warm-up and the end."""
    ends = load.ends - load.begun
    counted = [a for a in load.answers if given.warmup <= a.at < ends]
    latencies = sorted(a.latency * 1000 for a in counted if a.status == 200)
    statuses = Counter("lost" if a.status == LOST else str(a.status) for a in counted)
    failures = [a for a in load.answers if a.status not in given.expected]
    began = time.time() - (time.monotonic() - load.begun)
    tenths = Counter(int(10 * a.at) for a in load.answers if a.status == 200)
    used = resource.getrusage(resource.RUSAGE_SELF)
    rate = len(latencies) / (ends - given.warmup)
    return {
        "requests_per_second": round(rate, 2),
        "texts_per_second": round(rate * given.list, 2),
        "p50": quantile(latencies, 0.5),  # milliseconds
        "p99": quantile(latencies, 0.99),
        "statuses": dict(statuses),
        "began": round(began, 3),  # Unix time
        "failed": len(failures),
        "failures": [  # (sent, answered, status), in Unix time
            [round(began + a.at - a.latency, 3), round(began + a.at, 3), a.status]
            for a in failures[:MAX_FAILURES]
        ],
        "hung": hung,
        "unsent": load.unsent,
        # Responses with status 200 in each tenth of a second.
        "good_by_tenth": [tenths[i] for i in range(math.ceil(10 * ends - 1e-3))],
        "client_cores": round((used.ru_utime + used.ru_stime) / ends, 2),
    }


async def run(given: argparse.Namespace) -> dict[str, Any]:
    bodies = bodies_of(json.loads(given.texts.read_text(encoding="utf-8")), given.list)
    await asyncio.sleep(max(0.0, given.at - time.time()))
    load = Load(given.url, bodies, given.warmup + given.seconds)
    loop = asyncio.get_running_loop()
    timeout = asyncio.timeout_at(loop.time() + load.ends - load.begun + DRAIN_SECONDS)

    def stop() -> None:
        load.ends = min(load.ends, time.monotonic())
        timeout.reschedule(loop.time() + DRAIN_SECONDS)

    try:
        async with timeout:
            loop.add_signal_handler(signal.SIGTERM, stop)
            if given.rate:
                await load.open_loop(given.rate, given.connections)
            else:
                await load.closed_loop(given.connections)
    except TimeoutError:
        return summary(load, given, hung=load.waiting)
    return summary(load, given, hung=0)


def begin(url: str, texts: Path, **options: float | str) -> subprocess.Popen[str]:
    """Start a load in its own process; options as on the command line."""
    command = [sys.executable, __file__, url, "--texts", str(texts)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a load that `begin` started, and return its result.

    Raises:
        SystemExit: it fails.
    """
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"load.py ended with {process.returncode}")
    return dict(json.loads(out.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--texts", type=Path, required=True, help="a JSON list of strings")
    parser.add_argument("--list", type=int, default=1, help="texts per request")
    parser.add_argument("--connections", type=int, default=32, help="at most, with --rate")
    parser.add_argument("--seconds", type=float, default=10, help="measured")
    parser.add_argument("--warmup", type=float, default=2, help="seconds before the measurement")
    parser.add_argument("--rate", type=float, help="requests per second, sent on a schedule")
    parser.add_argument("--at", type=float, default=0, help="Unix time to start at; 0: now")
    parser.add_argument(
        "--expected",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[200, 429],
        help="comma-separated statuses that are no failures",
    )
    print(json.dumps(uvloop.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
