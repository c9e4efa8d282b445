"""Serving under faults: replicas killed and models replaced under load, and a tenfold overload.

    python benchmarks/serve_faults.py --json

Serves the small classifier with `raybert serve`. (1) With two replicas and a continuous load from a
client that never retries (`load.py`) and from raybert's own client, replicas are killed (SIGKILL)
one after another, each after the one before has been replaced. (2) Under the same load another
version of the model is promoted in the registry, and then the application is deployed again with
another model. (3) With one replica: the peak rate of 32 connections, then an open loop at ten times
that rate for a minute, followed at once by the 32 connections. Prints one JSON object: `kills`,
`updates` and `rolling_updates` with the requests that each client lost (every response but 200);
`overload` with the rate of good responses relative to the peak, their latency, all statuses, memory
and recovery. A replica or model that does not come up ends the script with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import load
import psutil
from clients import Clients, in_flight, otherwise
from origin import origin
from safetensors.torch import load_file, save_file
from servers import (
    ROOT,
    Server,
    free_port,
    raybert_promote,
    raybert_serve,
    reviews,
    say,
    small_classifier,
)

from raybert.serve.deploy.haproxy import HAPROXY

NAME = "reviews"  # the model's name in the registry
CALM_SECONDS = 3  # before each fault
TIMEOUT_SECONDS = 180  # of each wait
CONFIRMATIONS = 10  # consecutive responses of the new model
CPUS = 0.5  # logical CPUs of a replica
REQUESTS = 20  # enough that each replica answers one of them, under load
FULL_SPEED = 0.9  # of the peak rate: recovered
START_SECONDS = 5  # for a load's process to start


def kill_replicas(server: Server, clients: Clients, count: int, replicas: int) -> dict[str, Any]:
    """Kill replicas one after another, each after all of them answer again."""
    rng, kills = random.Random(0), []
    with clients:
        for number in range(1, count + 1):
            time.sleep(CALM_SECONDS)
            victim = rng.choice(sorted(process.pid for process in server.replicas()))
            struck = round(time.time(), 3)
            psutil.Process(victim).kill()
            back = wait_until(
                "all replicas answer again", lambda: len(server.answering(REQUESTS)) >= replicas
            )
            kills.append({"time": struck, "back_after": back})
            say(f"kill {number} of {count}: process {victim}; replaced after {back} s")
    failures = clients.got["never_retries"]["failures"]
    for kill in kills:
        kill["failed_in_flight"] = in_flight(failures, kill["time"])
    lost = otherwise(failures, [kill["time"] for kill in kills])
    return {"kills": kills, "failed_otherwise": lost, **clients.got}


def update(
    server: Server, clients: Clients, models: Sequence[Path], storage: Path, count: int
) -> Any:
    """Promote another version of the served model, several times."""
    updates = []
    with clients:
        for number in range(1, count + 1):
            time.sleep(CALM_SECONDS)
            before = server.get("/info")
            promote(models[number % len(models)], storage)

            def is_another(before: Any = before) -> bool:
                return all(server.get("/info") != before for _ in range(CONFIRMATIONS))

            taken = wait_until("the new model is served", is_another)
            updates.append({"seconds": taken})
            say(f"update {number} of {count}: served after {taken} s")
        time.sleep(CALM_SECONDS)  # for the last old replica to stop
    return {"updates": updates, **clients.got}


def roll(server: Server, clients: Clients, models: Sequence[Path], given: Any) -> dict[str, Any]:
    """Deploy with another model, so that Serve replaces all replicas, several times."""
    rolls = []
    environment = {**os.environ, **HAPROXY, "RAY_AUTH_MODE": "token"}
    with clients:
        for number in range(1, given.updates + 1):
            time.sleep(CALM_SECONDS)
            before = server.answering(REQUESTS)
            settings = {"model": str(models[number % len(models)]), "precision": given.precision}
            settings |= {"replicas": given.replicas, "cpus": CPUS, "threads": 1}
            command = [sys.executable, __file__, "--deploy", server.ray_address()]
            command += ["--settings", json.dumps(settings)]
            begun = time.monotonic()
            subprocess.run(command, cwd=ROOT, check=True, env=environment)

            def is_rolled(before: set[str] = before) -> bool:
                now = server.answering(REQUESTS)
                return not now & before and len(now) >= given.replicas

            wait_until("all replicas are new", is_rolled)
            rolls.append({"seconds": round(time.monotonic() - begun, 1)})
            say(f"rolling update {number} of {given.updates}: after {rolls[-1]['seconds']} s")
        time.sleep(CALM_SECONDS)
    return {"rolls": rolls, **clients.got}


def deploy(address: str, settings: dict[str, Any]) -> None:
    """Deploy the application on the Ray of a running server, as `serve deploy` does."""
    from ray import serve

    from raybert.cluster.session import RayConfig, ray_session
    from raybert.config import build
    from raybert.serve.deploy.deployment import APP, application
    from raybert.serve.runtime.model_sources import resolve
    from raybert.serve.settings import ServeConfig

    config = resolve(build(ServeConfig, settings, "serve"))
    with ray_session(RayConfig(address=address)):
        serve.run(application(config, digests=[]), name=APP, route_prefix="/")


def promote(model: Path, storage: Path) -> None:
    command = raybert_promote(model, NAME, storage)
    say(" ".join(command))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def another(model: Path, folder: Path) -> Path:
    """Copy a model and change its weights slightly."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    weights = {name: tensor * 1.001 for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def wait_until(what: str, holds: Callable[[], bool]) -> float:
    """Wait until `holds()`; return the seconds.

    Raises:
        SystemExit: a timeout; the measurements would be meaningless.
    """
    begun = time.monotonic()
    while (spent := time.monotonic() - begun) < TIMEOUT_SECONDS:
        if holds():
            return round(spent, 1)
        time.sleep(0.1)
    raise SystemExit(f"timeout: not true after {TIMEOUT_SECONDS} s: {what}")


class Memory(threading.Thread):
    """Samples a server's memory every two seconds."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server, self.over = server, threading.Event()
        self.seen: list[int] = []  # bytes

    def run(self) -> None:
        """Sample until `over` is set."""
        while not self.over.is_set():
            self.seen.append(self._server.memory())
            self.over.wait(2)


def overload(server: Server, file: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak, a multiple of it for a while, and the recovery right after that."""

    def begin(seconds: float, connections: int = given.connections, **more: float) -> Any:
        options = {"seconds": seconds, "connections": connections, "warmup": 0, **more}
        return load.begin(f"{server.url}/predict", file, **options)

    load.end(begin(5))  # warm-up
    peak = load.end(begin(given.seconds))["requests_per_second"]
    rate = given.times * peak
    say(f"peak: {peak:.0f} good responses/s; now {rate:.0f} requests/s")
    # Both processes wait for their start: the second begins when the first sends its last request.
    at = time.time() + START_SECONDS
    much = begin(given.overload_seconds, given.most_connections, rate=rate, at=at)
    next_one = begin(given.seconds, at=at + given.overload_seconds)
    time.sleep(max(0.0, at - time.time()))
    memory = Memory(server)
    memory.start()
    during = load.end(much)
    memory.over.set()
    after = load.end(next_one)
    memory.join()
    gap = after["began"] - (during["began"] + given.overload_seconds)
    third = max(1, len(memory.seen) // 3)
    keys = ("p50", "p99", "statuses", "failed", "failures", "hung", "unsent", "client_cores")
    return {
        "peak": peak,
        "offered": round(rate - during["unsent"] / given.overload_seconds, 1),  # requests/s
        "seconds": given.overload_seconds,
        "good": during["requests_per_second"],
        "share_of_peak": round(during["requests_per_second"] / peak, 3),
        **{key: during[key] for key in keys},
        "memory_mib": {
            "first_third": round(median(memory.seen[:third]) / 2**20),
            "last_third": round(median(memory.seen[-third:]) / 2**20),
        },
        "full_speed_after_s": recovered(after["good_by_tenth"], FULL_SPEED * peak, gap),
        "by_whole_seconds": recovered(after["good_by_tenth"], FULL_SPEED * peak, gap, step=10),
        "good_by_tenth_after": after["good_by_tenth"],
        "failed_after": after["failed"] + after["hung"],
    }


def recovered(
    good_by_tenth: Sequence[int], enough: float, gap: float, step: int = 1
) -> float | None:
    """The seconds from the overload's last request to the end of the first second at full speed.

    Args:
        good_by_tenth: good responses of the next load, by tenth of a second.
        enough: good responses in a second at full speed.
        gap: seconds between the last request of the overload and the first one of the next load.
        step: tenths between the starts of the seconds considered; 10: they do not overlap.

    Returns:
        None if no second was at full speed.
    """
    ends = range(10, len(good_by_tenth) + 1, step)
    fast = (end for end in ends if sum(good_by_tenth[end - 10 : end]) >= enough)
    return next((round(gap + end / 10, 2) for end in fast), None)


def faults(
    models: Sequence[Path], storage: Path, file: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Kill the replicas of a server, and update its model, as often as asked for."""
    promote(models[0], storage)
    settings = {"precision": given.precision, "replicas": given.replicas, "cpus": CPUS}
    registry = {"registry": storage, "poll_s": 1}
    port, found = free_port(), {}
    with Server("raybert", raybert_serve(NAME, port, **settings, **registry), port) as server:
        clients = [Clients(server, file, given.connections) for _ in range(3)]
        if given.kills:
            found["kills"] = kill_replicas(server, clients[0], given.kills, given.replicas)
        if given.updates:
            found["updates"] = update(server, clients[1], models, storage, given.updates)
            found["rolling_updates"] = roll(server, clients[2], models, given)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: made by configs/bench-serve.yaml")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--replicas", type=int, default=2, help="while they are killed")
    parser.add_argument("--kills", type=int, default=10, help="0: none")
    parser.add_argument("--updates", type=int, default=3, help="0: none")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement of the peak")
    parser.add_argument("--times", type=float, default=10, help="overload relative to the peak")
    parser.add_argument("--overload-seconds", type=float, default=60, help="0: no overload")
    parser.add_argument("--most-connections", type=int, default=2000, help="during the overload")
    parser.add_argument("--deploy", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    if given.deploy:
        deploy(given.deploy, given.settings)
        return
    model = small_classifier(given.model)
    texts, _ = reviews(model, 1000)
    result: dict[str, Any] = {
        "benchmark": "serving under faults",
        **origin(),
        "precision": given.precision,
    }
    with tempfile.TemporaryDirectory() as scratch:
        storage, file = Path(scratch), Path(scratch) / "texts.json"
        file.write_text(json.dumps(texts), encoding="utf-8")
        models = [model, another(model, storage / "another")]
        if given.kills or given.updates:
            result |= faults(models, storage, file, given)
        if given.overload_seconds:
            port = free_port()
            command = raybert_serve(model, port, precision=given.precision, replicas=1)
            with Server("raybert", command, port) as server:
                result["overload"] = overload(server, file, given)
    print(json.dumps(result, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
