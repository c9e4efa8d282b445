"""The overhead of Ray: the bare loop, one worker under Ray, and two workers.

    python benchmarks/ray_price.py --json

The three runs are started one after the other, each alone until its first timed step, and stopped
there (SIGSTOP to all processes of its Ray). Then they run in turns of a few seconds while the
others are stopped, so that drift of the machine's speed affects all three. Steps are timed by the
loop. Excluded, for all three, are the step during which a run was stopped and the two after it, in
which caches are cold and overdue timers fire. The memory layout of a process shifts a ratio by some
percent, so that the three are launched three times. Prints one JSON object: medians of tokens/s,
`one_worker_to_bare` (same threads) and `two_workers_to_one` (2 workers x 1 thread relative to 1
worker x 2 threads), with 64 rows of 256 tokens per step, and the ratios of each launch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from raybert.config import load
from raybert.experiment import Experiment
from raybert.pipeline.benchmarks import WARMUP_STEPS, bench_train
from raybert.terminal.display import Display

ROOT = Path(__file__).resolve().parent.parent
ROWS = 64  # per step
START_SECONDS = 180
SETTLING_STEPS = 2
ENDLESS = 100_000  # steps: the measurement ends a run
SETTINGS = {
    "bare": {"threads": 2},
    "one_worker": {"workers": 1, "threads": 2},
    "two_workers": {"workers": 2, "threads": 1},
}
RATIOS = (
    ("one_worker_to_bare", "one_worker", "bare"),
    ("two_workers_to_one", "two_workers", "one_worker"),
)


class Steps(Display):
    """Prints the duration of each step."""

    def record(self, record: dict[str, Any]) -> None:
        """Print a step's number and seconds as a line."""
        if record["kind"] == "train":
            print("step", record["step"], record["step_seconds"], flush=True)


class Run:
    """One of the three runs, in its own process, which is stopped except in `begin` and `turn`."""

    def __init__(self, name: str, config: Path) -> None:
        command = [sys.executable, __file__, "--config", str(config), "--run", name]
        print(" ".join(command), file=sys.stderr)
        self.name = name
        self.steps: list[float] = []  # seconds of each step
        self._begun = threading.Event()
        # SIGKILL ends it and leaves files behind; paths of Unix sockets are limited.
        self._scratch = tempfile.TemporaryDirectory(prefix="price-", ignore_cleanup_errors=True)
        env = os.environ | {"TMPDIR": self._scratch.name}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        threading.Thread(target=self._read, daemon=True).start()

    def begin(self) -> None:
        """Run until the warm-up steps are over."""
        ends = time.monotonic() + START_SECONDS
        while not self._begun.wait(0.5):
            self._check()
            if time.monotonic() > ends:
                raise SystemExit(f"{self.name} does not begin")
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        """Run for some seconds."""
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._check()
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Kill all its processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._scratch.cleanup()

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"{self.name} has ended: exit code {self._process.returncode}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("step "):
                _, step, seconds = line.split()
                self.steps.append(float(seconds))
                if int(step) >= WARMUP_STEPS:
                    self._begun.set()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def train(name: str, config: Path) -> None:
    """Run one of the three in this process, until it is killed."""
    given = {"global_batch_size": ROWS, "micro_batch_size": 32, "steps": ENDLESS, **SETTINGS[name]}
    overrides = [f"pretrain.{key}={value}" for key, value in given.items()]
    bench_train(
        load(Experiment, config, overrides), in_process=name == "bare", display=Steps(quiet=True)
    )


def measure(config: Path, rounds: int, seconds: float) -> dict[str, float]:
    """Start the three, run them in turns, and return the tokens/s of each."""
    tokens = ROWS * load(Experiment, config).corpus.seq_len
    runs: list[Run] = []
    try:
        for name in SETTINGS:
            runs.append(Run(name, config))
            runs[-1].begin()
        first = [len(run.steps) for run in runs]
        for number in range(rounds):
            for run in runs if number % 2 else reversed(runs):
                run.turn(seconds)
    finally:
        for run in runs:
            run.end()
    rates = _rates(runs, first, tokens, seconds)
    shown = "  ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    print(f"tokens/s  {shown}", file=sys.stderr, flush=True)
    return rates


def _rates(
    runs: Sequence[Run], first: Sequence[int], tokens: int, seconds: float
) -> dict[str, float]:
    """The tokens/s of each run over its timed steps."""
    timed = {r.name: _timed(r.steps[f:], seconds) for r, f in zip(runs, first, strict=True)}
    return {name: tokens * len(steps) / max(1e-9, sum(steps)) for name, steps in timed.items()}


def _timed(steps: Sequence[float], seconds: float) -> list[float]:
    """The steps that were not interrupted and do not follow an interrupted one."""
    stopped = [step > seconds for step in steps]  # an interruption takes two turns
    return [
        step
        for index, step in enumerate(steps)
        if not any(stopped[max(0, index - SETTLING_STEPS) : index + 1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/bench-keras.yaml")
    parser.add_argument("--launches", type=int, default=3, help="of all three runs")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each run per launch")
    parser.add_argument("--seconds", type=float, default=6, help="per turn")
    parser.add_argument("--run", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is printed")
    arguments = parser.parse_args()
    if arguments.run:
        train(arguments.run, arguments.config)
        return
    launches = [
        measure(arguments.config, arguments.rounds, arguments.seconds)
        for _ in range(arguments.launches)
    ]
    result: dict[str, Any] = {
        "tokens_per_second": {
            name: round(median(rates[name] for rates in launches)) for name in SETTINGS
        }
    }
    for key, part, whole in RATIOS:
        ratios = [round(rates[part] / rates[whole], 3) for rates in launches]
        result |= {key: median(ratios), f"{key}_by_launch": ratios}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
