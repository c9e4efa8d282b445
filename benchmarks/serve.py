"""Speed of the small classifier over HTTP, compared with `transformers.pipeline` behind FastAPI.

    python benchmarks/serve.py --json

Twice, with fp32 and with the precision that `raybert bench serve` selects (`best`: the fastest one
that loses at most half a point of accuracy), it starts both servers and measures them and the bare
classifier in turns (`turns` below), each under a load from its own process (`load.py`) while the
others are idle, so that drift of the machine's speed affects all of them. See README.md. Prints one
JSON object: for each precision `requests_per_second`, `p50` and `p99` in milliseconds of both
servers, `ratio`, `share_of_bare`, `one_connection`, `accuracy`, and for `best` the accuracy points
lost relative to fp32 on the same texts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import load
from origin import origin
from servers import (
    RAYBERT,
    ROOT,
    Server,
    free_port,
    hugging_face,
    raybert_serve,
    reviews,
    say,
    small_classifier,
)

US, THEM = "raybert", "transformers"
LIST = 32  # texts per request of lists
LIST_CONNECTIONS = 4  # 128 texts in flight keep the server busy
WARM_TEXTS = 64
ONE_BY_ONE = 128  # texts over one connection, and the same ones in the bare forward pass
PRECISIONS = ("fp32", "best")
MAX_POINTS_LOST = 0.5  # of accuracy, by the best precision

Turns = dict[str, Callable[[], dict[str, Any]]]


def choose(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run `raybert bench serve`, which selects a precision and replaces a stored choice.

    Raises:
        SystemExit: it fails.
    """
    command = [*RAYBERT, "bench", "serve", "--model", str(model), "--json"]
    command += ["--texts", str(given.choice_texts)]
    say(" ".join(command))
    threads = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(command, cwd=ROOT, env=threads, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"raybert bench serve ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def turns(ours: Server, theirs: Server, texts: Path, bare: Sequence[str], given: Any) -> Turns:
    """The turns: by name, a function that measures once."""

    def drive(server: Server, texts: Path = texts, **options: float) -> dict[str, Any]:
        times = {"seconds": given.seconds, "warmup": given.warmup}
        found = load.end(load.begin(f"{server.url}/predict", texts, **options, **times))
        del found["good_by_tenth"]
        return found

    few = texts.with_name("few.json")
    every = json.loads(texts.read_text(encoding="utf-8"))
    few.write_text(json.dumps(every[:ONE_BY_ONE]), encoding="utf-8")

    def call() -> dict[str, Any]:
        done = subprocess.run(bare, stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    return {
        THEM: lambda: drive(theirs, connections=given.connections),
        US: lambda: drive(ours, connections=given.connections),
        "lists": lambda: drive(ours, connections=LIST_CONNECTIONS, list=LIST),
        "one_connection": lambda: drive(ours, few, connections=1),
        "bare": call,
    }


def measure(
    precision: str,
    model: Path,
    texts: Path,
    given: argparse.Namespace,
    labels: dict[str, list[str]],
) -> dict[str, Any]:
    """Start both servers and measure them, ours at a precision; add our predictions to `labels`."""
    ports = free_port(), free_port()
    theirs = Server(THEM, hugging_face(model, ports[0], given.threads), ports[0])
    command = raybert_serve(model, ports[1], precision=precision, threads=given.threads)
    ours = Server(US, command, ports[1])
    with theirs, ours:
        info = ours.get("/info")
        bare = [sys.executable, __file__, "--bare", precision, "--model", str(model)]
        bare += ["--texts-file", str(texts), "--threads", str(given.threads)]
        taking = turns(ours, theirs, texts, [*bare, "--seconds", str(given.seconds)], given)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in taking}
        for number in range(given.rounds):
            for name in taking if number % 2 else reversed(taking):
                rounds[name].append(taking[name]())
                rate, p50 = (rounds[name][-1][key] for key in ("texts_per_second", "p50"))
                if p50 is None:
                    raise SystemExit(f"serve.py: no response from {name}: {rounds[name][-1]}")
                shown = f"{name:<15}{rate:>9,.1f} texts/s   p50 {p50:.1f} ms"
                say(f"[{number + 1}/{given.rounds}] {precision} {shown}")
        idle = {server.name: server.cores_used() for server in (ours, theirs)}
        labels[precision] = predicted(ours, texts)
        if THEM not in labels:  # theirs do not change
            labels[THEM] = predicted(theirs, texts)
    return summarize(rounds) | {"info": info, "idle_cores": idle}


def summarize(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Summarize the rounds: medians, and ratios of medians."""

    def median_of(name: str, key: str) -> float:
        return median(turn[key] for turn in rounds[name])

    rates = {name: median_of(name, "requests_per_second") for name in (US, THEM)}
    bulk = median_of("bare", "texts_per_second")
    one, forward = median_of("one_connection", "p50"), median_of("bare", "p50")
    return {
        "requests_per_second": rates,
        "p50": {name: round(median_of(name, "p50"), 2) for name in rates},
        "p99": {name: round(median_of(name, "p99"), 2) for name in rates},
        "ratio": round(rates[US] / rates[THEM], 3),
        "bare_texts_per_second": bulk,
        "share_of_bare": {
            f"lists_of_{LIST}": round(median_of("lists", "texts_per_second") / bulk, 3),
            "one_text_a_request": round(median_of(US, "texts_per_second") / bulk, 3),
        },
        "one_connection": {
            "p50": round(one, 2),
            "bare_forward_p50": round(forward, 2),
            "added": round(one - forward, 2),
        },
        "rounds": rounds,
    }


def predicted(server: Server, texts: Path) -> list[str]:
    """The label that a server predicts for each text."""
    every = json.loads(texts.read_text(encoding="utf-8"))
    lists = [every[i : i + LIST] for i in range(0, len(every), LIST)]
    return [scores[0]["label"] for group in lists for scores in server.ask(group)]


def points_lost(exact: Sequence[str], found: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """The accuracy that a precision loses, from the texts that only one of the two gets right.

    Args:
        exact: labels predicted in fp32.
        found: labels predicted in the precision.
        truth: the right labels.

    Returns:
        points: of accuracy that are lost; negative for a gain.
        at_most: the upper bound of a one-sided 95% confidence interval.
        worse, better: the number of texts that only fp32, or only the precision, gets right.
        ok: whether at most MAX_POINTS_LOST are lost.
    """
    triples = list(zip(exact, found, truth, strict=True))
    worse = sum(before == right != after for before, after, right in triples)
    better = sum(after == right != before for before, after, right in triples)
    lost, count = worse - better, len(triples)
    spread = math.sqrt(worse + better - lost**2 / count)
    points = 100 * lost / count
    return {
        "points": round(points, 3),
        "at_most": round(points + 100 * 1.645 * spread / count, 3),
        "worse": worse,
        "better": better,
        "ok": points <= MAX_POINTS_LOST,
    }


def share_equal(left: Sequence[str], right: Sequence[str]) -> float:
    """The share of indices at which two lists are equal."""
    return round(sum(a == b for a, b in zip(left, right, strict=True)) / len(left), 4)


def call_bare(given: argparse.Namespace) -> dict[str, Any]:
    """Run the classifier in this process: all texts in one call, then forward passes one by one."""
    import torch

    from raybert.inference.classifier import TextClassifier
    from raybert.storage.folder import Folder

    torch.set_num_threads(given.threads)
    classifier = TextClassifier(Folder(str(given.model)), precision=given.bare)
    texts = json.loads(given.texts_file.read_text(encoding="utf-8"))
    classifier.logits(texts[:WARM_TEXTS])
    done, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < given.seconds:
        classifier.logits(texts)
        done += len(texts)
    passes = []
    for row in classifier.encode(texts[:ONE_BY_ONE]):
        started = time.perf_counter()
        classifier.score([row])
        passes.append(1000 * (time.perf_counter() - started))
    return {"texts_per_second": round(done / spent, 2), "p50": median(passes)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: made by configs/bench-serve.yaml")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="per turn")
    parser.add_argument("--warmup", type=float, default=3, help="seconds before each measurement")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--texts", type=int, default=2000, help="held-out reviews")
    parser.add_argument("--choice-texts", type=int, default=5000, help="to select a precision")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each server")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--texts-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    given = parser.parse_args()
    unknown = set(given.precisions.split(",")) - set(PRECISIONS)
    if unknown:
        parser.error(f"--precisions {given.precisions}: known are {', '.join(PRECISIONS)}")
    return given


def main() -> None:
    given = parse_arguments()
    if given.bare:
        print(json.dumps(call_bare(given)))
        return
    model = small_classifier(given.model)
    texts, truth = reviews(model, given.texts)
    lengths = sorted(map(len, texts))
    result: dict[str, Any] = {
        "benchmark": "serving",
        **origin("transformers", "uvicorn"),
        "model": str(model),
        "texts": {"count": len(texts), "median_characters": lengths[len(lengths) // 2]},
        "connections": given.connections,
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "texts.json"
        file.write_text(json.dumps(texts), encoding="utf-8")
        labels: dict[str, list[str]] = {}
        for name in given.precisions.split(","):
            precision = name
            if name == "best":
                result["choice"] = choose(model, given)
                precision = result["choice"]["precision"]
            found = measure(precision, model, file, given, labels)
            labels_of = {US: labels[precision], THEM: labels[THEM]}
            found["accuracy"] = {who: share_equal(labels_of[who], truth) for who in labels_of}
            found["same_labels"] = share_equal(labels_of[US], labels_of[THEM])
            if "fp32" in labels:
                found["lost"] = points_lost(labels["fp32"], labels[precision], truth)
                if not found["lost"]["ok"]:
                    say(f"{precision} loses more than {MAX_POINTS_LOST} points: {found['lost']}")
            result[name] = found
    print(json.dumps(result, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
