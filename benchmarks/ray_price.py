"""What Ray costs: the bare loop against the loop under Ray, and one worker against two.

    python benchmarks/ray_price.py --json

The three runs are started one after the other, each alone until its first timed step, and stopped
there (SIGSTOP, with all processes of its Ray). Then they take turns of a few seconds: one goes on,
the others stay stopped, so a noisy machine is as noisy for each of them. The first second and a
half of a turn is not timed, for any of the three: caches fill again, and every missed timer
goes off at once, which is the stopping's doing. Ends with one JSON object: tokens/s,
`one_worker_to_bare` (same threads), and `two_workers_to_one` (2 workers x 1 thread against 1 worker
x 2 threads), over 64 rows of 256 a step, and the same ratios for each third of the time.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from raybert.bench import WARM_STEPS, bench_train
from raybert.config import load
from raybert.display import Display
from raybert.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent
ROWS = 64  # a step
SETTLE_SECONDS = 1.5
ENDLESS = 100_000  # steps: a run ends when the measurement does
SETTINGS = {
    "bare": {"threads": 2},
    "one_worker": {"workers": 1, "threads": 2},
    "two_workers": {"workers": 2, "threads": 1},
}


class Steps(Display):
    """Prints the number of every step."""

    def record(self, record: dict[str, Any]) -> None:
        """Print a step's number as a line of its own."""
        if record["kind"] == "train":
            print(record["step"], flush=True)


class Run:
    """One of the three, in a process of its own; it runs only inside `turn`."""

    def __init__(self, name: str, config: Path) -> None:
        command = [sys.executable, __file__, "--config", str(config), "--run", name]
        print(" ".join(command), file=sys.stderr)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.steps, self._timed, self._seconds = 0, 0, 0.0
        self._begun = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._begun.wait(180):
            raise SystemExit(f"{name} does not begin")
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        """Go on for a while."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        steps, begun = self.steps, time.perf_counter()
        time.sleep(seconds)
        self._timed += self.steps - steps
        self._seconds += time.perf_counter() - begun
        self._signal(signal.SIGSTOP)
        if self._process.poll() is not None:
            raise SystemExit(f"a run has ended: exit code {self._process.returncode}")

    def done(self) -> tuple[int, float]:
        """The timed steps and the seconds that they took."""
        return self._timed, self._seconds

    def end(self) -> None:
        """Kill all of its processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdecimal():
                self.steps = int(line)
                if self.steps >= WARM_STEPS:
                    self._begun.set()

    def _signal(self, number: signal.Signals) -> None:
        root = psutil.Process(self._process.pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def train(name: str, config: Path) -> None:
    """Run one of the three in this process, without end."""
    given = {"global_batch_size": ROWS, "micro_batch_size": 32, "steps": ENDLESS, **SETTINGS[name]}
    overrides = [f"pretrain.{key}={value}" for key, value in given.items()]
    bench_train(load(Experiment, config, overrides), bare=name == "bare", display=Steps(quiet=True))


def measure(config: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Start the three, let them take turns, and compare."""
    seq_len = load(Experiment, config).corpus.seq_len
    runs: dict[str, Run] = {}
    marks: list[dict[str, tuple[int, float]]] = []
    try:
        for name in SETTINGS:
            runs[name] = Run(name, config)
        marks.append({name: run.done() for name, run in runs.items()})
        for third in range(3):
            for number in range(rounds // 3):
                for name in list(runs) if number % 2 else reversed(list(runs)):
                    runs[name].turn(seconds)
            marks.append({name: run.done() for name, run in runs.items()})
            rates = {k: _rate(marks[third], marks[-1], k, seq_len) for k in runs}
            shown = "  ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            print(f"third {third + 1}: tokens/s {shown}", file=sys.stderr, flush=True)
    finally:
        for run in runs.values():
            run.end()
    whole = {name: _rate(marks[0], marks[-1], name, seq_len) for name in runs}
    thirds = [
        {name: _rate(before, after, name, seq_len) for name in runs}
        for before, after in zip(marks, marks[1:], strict=False)
    ]
    return {
        "tokens_per_second": {name: round(rate) for name, rate in whole.items()},
        **_ratios(whole),
        "thirds": [_ratios(third) for third in thirds],
        "steps": {name: marks[-1][name][0] for name in runs},
    }


def _rate(
    before: dict[str, tuple[int, float]],
    after: dict[str, tuple[int, float]],
    name: str,
    seq_len: int,
) -> float:
    (first, begun), (last, ended) = before[name], after[name]
    return (last - first) * ROWS * seq_len / max(1e-9, ended - begun)


def _ratios(rates: dict[str, float]) -> dict[str, float]:
    return {
        "one_worker_to_bare": round(rates["one_worker"] / rates["bare"], 4),
        "two_workers_to_one": round(rates["two_workers"] / rates["one_worker"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/bench-keras.yaml")
    parser.add_argument("--rounds", type=int, default=24, help="turns of each run; a multiple of 3")
    parser.add_argument("--seconds", type=float, default=5, help="timed of a turn")
    parser.add_argument("--run", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is printed")
    arguments = parser.parse_args()
    if arguments.run:
        train(arguments.run, arguments.config)
        return
    print(json.dumps(measure(arguments.config, arguments.rounds, arguments.seconds)))


if __name__ == "__main__":
    main()
