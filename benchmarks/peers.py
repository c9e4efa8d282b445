"""Masked-language-model pretraining speed of raybert and of other implementations.

Each peer runs in its own process, one at a time, and the peers alternate over the repeats, so that
drift of the machine's speed affects all of them. See README.md.

    python benchmarks/peers.py --shape keras --repeats 3 --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contenders.common import SHAPES
from origin import origin

HERE = Path(__file__).resolve().parent
US = "raybert"


@dataclass(frozen=True)
class Peer:
    """A command whose last line of output is a JSON object with `tokens_per_second`."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def peer_script(name: str, *options: str, **environment: str) -> Peer:
    return Peer((sys.executable, str(HERE / "contenders" / name), *options), environment)


PEERS = {
    "keras-tf": peer_script("keras_mlm.py", KERAS_BACKEND="tensorflow"),
    "keras-torch": peer_script("keras_mlm.py", KERAS_BACKEND="torch"),
    "hf-fp32": peer_script("hf_trainer.py", "--precision", "fp32"),
    "hf-bf16": peer_script("hf_trainer.py", "--precision", "bf16"),
    US: Peer((str(Path(sys.executable).parent / "raybert"), "bench", "train")),
}
GROUPS = {"hf": ("hf-fp32", "hf-bf16"), "keras": ("keras-tf", "keras-torch")}
# Keras' example has one shape only.
DEFAULTS = {"keras": "keras-tf,keras-torch,hf,raybert", "small": "hf,raybert"}


class PeerFailed(Exception):
    """A peer printed no result."""


def main() -> int:
    arguments = parse_arguments()
    names = resolve(arguments.peers or DEFAULTS[arguments.shape])
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for repeat in range(arguments.repeats):
            for name in names:
                started = time.monotonic()
                result = run(name, arguments)
                results[name].append(result)
                say(
                    f"[{repeat + 1}/{arguments.repeats}] {name:<12}"
                    f"{result['tokens_per_second']:>10,.0f} tokens/s"
                    f"   ({result.get('steps', '?')} steps, {time.monotonic() - started:.0f} s)"
                )
    except PeerFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    report = summarize(arguments, results)
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="keras")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", help=f"comma-separated: {', '.join([*PEERS, *GROUPS])}")
    parser.add_argument("--seconds", type=float, default=30, help="per turn, after warm-up")
    parser.add_argument("--min-steps", type=int, default=4, help="per turn, after warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.threads < 1 or arguments.min_steps < 1:
        parser.error("--repeats, --threads and --min-steps must be at least 1")
    try:
        resolve(arguments.peers or "")
    except KeyError as error:
        parser.error(f"unknown peer {error}; known: {', '.join([*PEERS, *GROUPS])}")
    return arguments


def resolve(peers: str) -> list[str]:
    """Expand the groups of a comma-separated list, keeping its order.

    Raises:
        KeyError: a name that is neither a peer nor a group.
    """
    names: list[str] = []
    for name in filter(None, peers.split(",")):
        if name not in PEERS and name not in GROUPS:
            raise KeyError(name)
        names += [peer for peer in GROUPS.get(name, (name,)) if peer not in names]
    return names


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a peer once and return its result.

    Raises:
        PeerFailed: it is not installed, it failed, or it printed no result.
    """
    peer = PEERS[name]
    command = [*peer.command, "--threads", str(arguments.threads)]
    if name == US:
        config = HERE.parent / "configs" / f"bench-{arguments.shape}.yaml"
        command += ["--config", str(config), "--bare", "--json"]
    else:
        command += [
            "--shape",
            arguments.shape,
            "--seconds",
            str(arguments.seconds),
            "--min-steps",
            str(arguments.min_steps),
        ]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **peer.environment,
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PeerFailed(f"{name}: {command[0]} is absent; `make bench` installs it") from None
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
        float(result["tokens_per_second"])
    except (IndexError, ValueError, KeyError, TypeError):
        tail = "\n".join((done.stderr + done.stdout).strip().splitlines()[-15:])
        raise PeerFailed(
            f"{name} gave no result (exit code {done.returncode}): {' '.join(command)}\n{tail}"
        ) from None
    return dict(result)


def summarize(
    arguments: argparse.Namespace, results: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Summarize the turns: each peer's median, and raybert's median relative to it."""
    peers: dict[str, Any] = {}
    for name, turns in results.items():
        values = [float(turn["tokens_per_second"]) for turn in turns]
        peers[name] = {
            "tokens_per_second": statistics.median(values),
            "values": values,
            "turns": turns,
        }
    ours = peers.get(US)
    for name, peer in peers.items():
        # Above 1: raybert is faster.
        if ours and name != US:
            peer["ratio"] = ours["tokens_per_second"] / peer["tokens_per_second"]
    return {
        "benchmark": "pretraining",
        "shape": arguments.shape,
        **asdict(SHAPES[arguments.shape]),
        **origin(),
        "threads": arguments.threads,
        "platform": platform.platform(),
        "peers": peers,
        "ratio": {name: peer["ratio"] for name, peer in peers.items() if "ratio" in peer},
    }


def table(report: Mapping[str, Any]) -> str:
    """Format the result as text."""
    lines = [f"{report['shape']} shape, {report['threads']} threads, {report['cpu']}"]
    for name, peer in report["peers"].items():
        spread = f"{min(peer['values']):,.0f} to {max(peer['values']):,.0f}"
        ratio = f"   raybert is {peer['ratio']:.1f}x" if "ratio" in peer else ""
        lines.append(f"{name:<12}{peer['tokens_per_second']:>10,.0f} tokens/s ({spread}){ratio}")
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
