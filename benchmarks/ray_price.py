"""What Ray costs: the bare loop against the loop under Ray, and one worker against two.

    python benchmarks/ray_price.py --json

All runs are processes of their own and take turns, so that a noisy machine is noisy for all. Ends
with one JSON object: medians of tokens/s, `one_worker_to_bare` (same threads), and
`two_workers_to_one` (2 workers x 1 thread against 1 worker x 2 threads, 64 rows of 256 a step).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAYBERT = Path(sys.executable).with_name("raybert")
# Long enough that the start of Ray's operators, beside the first steps, is a part as small as in a
# real run.
STEP = [
    *("--set", "pretrain.global_batch_size=64"),
    *("--set", "pretrain.micro_batch_size=32"),
    *("--set", "pretrain.steps=140"),
]
TURNS = {
    "bare": ["--bare", "--threads", "2"],
    "one_worker": ["--workers", "1", "--threads", "2"],
    "two_workers": ["--workers", "2", "--threads", "1"],
}


def turn(name: str, config: Path) -> float:
    command = [str(RAYBERT), "bench", "train", "-c", str(config), *STEP, *TURNS[name], "--json"]
    print(" ".join(command), file=sys.stderr)
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    rate = float(json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])
    print(f"{name:<12} {rate:>10,.0f} tokens/s", file=sys.stderr, flush=True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/bench-keras.yaml")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is printed")
    arguments = parser.parse_args()
    measured: dict[str, list[float]] = {name: [] for name in TURNS}
    for _ in range(arguments.repeats):
        for name in TURNS:
            measured[name].append(turn(name, arguments.config))
    medians = {name: statistics.median(rates) for name, rates in measured.items()}
    result = {
        "measured": measured,
        "medians": medians,
        "one_worker_to_bare": round(medians["one_worker"] / medians["bare"], 4),
        "two_workers_to_one": round(medians["two_workers"] / medians["one_worker"], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
