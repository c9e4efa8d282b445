"""Measurements of the hyperparameter search on the demo's model and real reviews, one at a time.

    python benchmarks/tune.py --row demo --json

Needs `raybert demo` in the same storage first. Rows:

demo      configs/tune-demo.yaml; winner and configured values on held-out texts, with all seeds
asha      the same random configurations with ASHA and without a scheduler
overhead  the time from a trial's creation to its first step, except the first trial of each worker
killed    the driver and its Ray are killed three times during a search and restarted; searcher and
          scheduler are the demo's
pbt       population-based training of 4 trials: the weights and values of every exchange
refused   search spaces with one mistake each: one line, exit code 2, and no trial

Progress goes to standard error; the last line of output is one JSON object. A finished search is
not repeated: pass another --storage, or delete its runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from origin import origin

from raybert.cluster.session import ray_session
from raybert.config import load
from raybert.experiment import Experiment
from raybert.pipeline.stages import evaluate_model
from raybert.storage.folder import Folder
from raybert.terminal.display import Display
from raybert.train.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "tune-demo.yaml"
KILLS = 3
OVER = ("finished", "stopped")  # states of trials that ended by themselves, or by ASHA
TIMEOUT_SECONDS = 3600


#: Settings of searches whose finalists are not measured.
NO_FINALS = ("tune.finalists=1", "tune.seeds=1", "tune.test=false")


def settings(storage: Path, name: str, *overrides: str) -> list[str]:
    """The settings of a separate search on the demo's model."""
    given = {
        "run.storage": str(storage),
        "run.name": name,
        "finetune.initialize_from": str(storage / "demo"),
    }
    return [f"{key}={value}" for key, value in given.items()] + list(overrides)


def command(*given: Any) -> list[str]:
    """The command that runs a search with these settings."""
    options = [part for text in settings(*given) for part in ("--set", text)]
    return [sys.executable, "-m", "raybert", "tune", "-c", str(CONFIG), *options, "--json"]


def run(*given: Any) -> dict[str, Any]:
    """Run a search and return its result.

    Raises:
        SystemExit: it fails.
    """
    done = subprocess.run(command(*given), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"raybert tune ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def trials_of(storage: Path, name: str) -> list[dict[str, Any]]:
    """The trials of a finished search, without the finalists' runs."""
    return list(json.loads((storage / name / "tune" / "trials.json").read_text())["trials"])


def demo(storage: Path, searches: int) -> dict[str, Any]:
    """Run the demo's search; compare winner and configured values on held-out texts."""
    found = []
    for seed in range(searches):
        name = f"bench-demo-{seed}"
        given = (storage, name, f"tune.seed={seed}", "tune.keep_models=true")
        begun = time.time()
        result = run(*given)
        experiment = load(Experiment, CONFIG, settings(*given))
        held_out = {
            which: _held_out(experiment, result[which]["trial"], result[which]["seeds"]["n"])
            for which in ("best", "default")
        }
        found.append(
            {
                "search_seed": seed,
                "trials": result["trials"],
                "minutes": round((time.time() - begun) / 60, 2),  # start-up included
                "validation": {which: result[which] for which in ("best", "default")},
                "held_out": held_out,
                "difference": round(held_out["best"]["mean"] - held_out["default"]["mean"], 5),
                "cost": result["cost"],
            }
        )
    return {
        "minutes": max(search["minutes"] for search in found),
        "trials": min(search["trials"]["all"] for search in found),
        "difference": statistics.fmean(search["difference"] for search in found),
        "searches": found,
    }


def _held_out(experiment: Experiment, trial: str, seeds: int) -> dict[str, Any]:
    """The accuracy of a finalist's models on the evaluation texts."""
    runs, values = experiment.folder / "tune" / "seeds", []
    with ray_session(experiment.ray):
        for number in range(1, seeds + 1):
            model = runs / f"{trial}-s{number}" / "model"
            values.append(evaluate_model(experiment, model, Display())["accuracy"])
    return {
        "trial": trial,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def asha(storage: Path, trials: int) -> dict[str, Any]:
    """Compare the best score and the compute with ASHA and without a scheduler."""
    drawn = ("tune.searcher=random", f"tune.trials={trials}", "tune.finalists=1", "tune.test=false")
    found = {}
    for kind in ("none", "asha"):
        name = f"bench-asha-{kind}"
        result = run(storage, name, *drawn, f"tune.scheduler.kind={kind}")
        rows = trials_of(storage, name)
        found[kind] = {
            # The best trial of the search; over several seeds the configured values may win.
            "best": max(finalists_of(storage, name), key=lambda found: found["score"] or 0.0),
            "best_accuracy": max(row["accuracy"] or 0.0 for row in rows),
            "trial_seconds": round(sum(row["seconds"] for row in rows), 1),
            "steps": sum(_steps(storage, name, row["trial"]) for row in rows),
            "states": result["trials"],
            "configurations": [row["values"] for row in rows],
            "seconds": result["seconds"],
        }
    none, some = found["none"], found["asha"]
    same = none.pop("configurations") == some.pop("configurations")
    spread = none["best"]["seeds"]["accuracy"]["std"]
    return {
        "same_configurations": same,
        "compute_ratio": round(some["steps"] / none["steps"], 4),
        "time_ratio": round(some["trial_seconds"] / none["trial_seconds"], 4),
        "best_difference": round(some["best_accuracy"] - none["best_accuracy"], 5),
        "mean_difference": round(
            some["best"]["seeds"]["accuracy"]["mean"] - none["best"]["seeds"]["accuracy"]["mean"], 5
        ),
        "spread_of_seeds": spread,
        **found,
    }


def finalists_of(storage: Path, name: str) -> list[dict[str, Any]]:
    """The finalists of a search, with the results of their seeds."""
    found = json.loads((storage / name / "tune" / "trials.json").read_text())
    return list(found["finalists"])


def _steps(storage: Path, name: str, trial: str) -> int:
    """The optimizer steps that a trial took."""
    records = read_metrics(Folder(storage / name / "tune" / "trials" / trial))
    return max((r["step"] for r in records), default=0)


def overhead(storage: Path, trials: int) -> dict[str, Any]:
    """Measure the time from a trial's creation to its first step, in a warm worker."""
    name = "bench-overhead"
    short = ("finetune.steps=20", "finetune.evaluations=1", "finetune.log_every=1")
    drawn = ("tune.scheduler.kind=none", "tune.searcher=random", f"tune.trials={trials}")
    run(storage, name, *short, *drawn, *NO_FINALS)
    waits: dict[str, dict[str, float]] = {}
    for row in trials_of(storage, name):
        records = read_metrics(Folder(storage / name / "tune" / "trials" / row["trial"]))
        start = next(r["time"] for r in records if r.get("event") == "start")
        step = next(r["time"] for r in records if r["kind"] == "train")
        waits[row["trial"]] = {
            "until_loaded": round(start - row["begun"], 2),
            "until_first_step": round(step - row["begun"], 2),
        }
    cold = sorted(waits)[: _workers(storage, name)]
    warm = [w["until_first_step"] for trial, w in waits.items() if trial not in cold]
    return {
        "median": statistics.median(warm),
        "most": max(warm),
        "first": max(waits[trial]["until_first_step"] for trial in cold),
        "trials": waits,
    }


def _workers(storage: Path, name: str) -> int:
    """The number of trials that began before the first one ended."""
    rows = trials_of(storage, name)
    ended = min(row["ended"] for row in rows)
    return sum(row["begun"] < ended for row in rows)


class Search:
    """A search in its own process group, which can be killed together with its Ray."""

    def __init__(self, storage: Path, name: str, *overrides: str) -> None:
        self.stage = storage / name / "tune"
        self._command = command(storage, name, *overrides)

    def start(self) -> subprocess.Popen[str]:
        """Start or resume it."""
        return subprocess.Popen(
            self._command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def finished(self) -> dict[str, int]:
        """The finished trials, with their numbers of attempts."""
        found = {}
        for folder in ("trials", "seeds"):
            for path in sorted((self.stage / folder).glob("*/result.json")):
                attempts = len(list((path.parent / "attempts").glob("*.json")))
                found[f"{folder}/{path.parent.name}"] = attempts
        return found

    def records(self) -> int:
        """The number of lines that all trials have logged; it grows during training."""
        return sum(
            len(path.read_text(errors="replace").splitlines())
            for path in self.stage.glob("*/*/metrics/*.jsonl")
        )


def killed(storage: Path, trials: int, seed: int) -> dict[str, Any]:
    """Kill a search three times; check that no trial is lost and none is repeated."""
    draws = random.Random(seed)
    short = ("finetune.steps=200", "finetune.log_every=5", "finetune.checkpoint_steps=25")
    search = Search(storage, "bench-killed", *short, f"tune.trials={trials}", *NO_FINALS)
    kills, over, result = [], {}, None
    begun = time.time()
    while result is None:
        process = search.start()
        before, ends = search.records(), time.monotonic() + TIMEOUT_SECONDS
        strike = before + draws.randint(20, 80) if len(kills) < KILLS else None
        while process.poll() is None:
            time.sleep(0.5)
            if strike is not None and search.records() >= strike:
                over = search.finished()
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills.append({"at": round(time.time() - begun, 1), "finished": over})
                print(f"killed: {len(kills)} of {KILLS}, {len(over)} over", file=sys.stderr)
                break
            if time.monotonic() > ends:
                os.killpg(process.pid, signal.SIGKILL)
                raise SystemExit("timeout: the search does not finish")
        else:
            out = process.communicate()[0]
            if process.returncode:
                raise SystemExit(f"raybert tune ended with {process.returncode}")
            result = json.loads(out.splitlines()[-1])
    last = search.finished()
    again = [
        trial
        for kill in kills
        for trial, attempts in kill["finished"].items()
        if last.get(trial) != attempts
    ]
    rows = trials_of(storage, "bench-killed")
    return {
        "kills": len(kills),
        "kept": all(row["state"] in OVER for row in rows) and len(rows) == trials,
        "killed": kills,
        "trials": result["trials"],
        "wanted": trials,
        "names": [row["trial"] for row in rows],
        "finished_ones_run_again": again,
        "resumed": sum(attempts > 1 for attempts in last.values()),
        "seconds": round(time.time() - begun, 1),
    }


def pbt(storage: Path) -> dict[str, Any]:
    """Record the weights and values of every exchange in a population of 4."""
    name = "bench-pbt"
    space = (
        "{finetune.lr: {log_uniform: [1.0e-5, 5.0e-3]}, finetune.dropout: {uniform: [0.0, 0.4]}}"
    )
    population = ("tune.scheduler.kind=pbt", "tune.scheduler.interval_epochs=0.17", "tune.trials=4")
    drawn = (f"tune.space={space}", "tune.searcher=random")
    result = run(storage, name, *population, *drawn, *NO_FINALS)
    report = (storage / name / "tune" / "report.html").read_text(encoding="utf-8")
    exchanges = [
        {"trial": row["trial"], **exchange}
        for row in trials_of(storage, name)
        for exchange in row["exchanges"]
    ]
    return {
        "exchanges": len(exchanges),
        "weights_equal": bool(exchanges)
        and all(e["weights"] == e.get("weights_after") for e in exchanges),
        "rate_trained_with_is_the_mutated_one": bool(exchanges)
        and all("trained" in e and e["trained"]["lr"] == e["trained"]["due"] for e in exchanges),
        "in_the_report": "Exchanges" in report,
        "all": exchanges,
        "trials": result["trials"],
        "seconds": result["seconds"],
    }


#: Search spaces with one mistake each, and the word that the message must contain.
MISTAKES = {
    "a misspelt key": ("{finetune.laerning_rate: {uniform: [0.1, 0.2]}}", "finetune.laerning_rate"),
    "a misspelt kind": ("{finetune.lr: {log_unifrm: [1.0e-4, 1.0e-3]}}", "log_unifrm"),
    "an empty range": ("{finetune.lr: {log_uniform: [1.0e-3, 1.0e-3]}}", "finetune.lr"),
    "an empty choice": ("{finetune.head.pooling: {choice: []}}", "finetune.head.pooling"),
    "a value the configuration refuses": ("{finetune.dropout: {uniform: [0, 2]}}", "dropout"),
    "a key that can't be searched": ("{finetune.seed: {integer: [0, 9]}}", "finetune.seed"),
}


def refused(storage: Path) -> dict[str, Any]:
    """Record the messages for search spaces with a mistake."""
    name, found = "bench-refused", {}
    for mistake, (space, names) in MISTAKES.items():
        begun = time.monotonic()
        given = command(storage, name, f"tune.space={space}")
        done = subprocess.run(given, capture_output=True, text=True, check=False)
        lines = done.stderr.splitlines()
        found[mistake] = {
            "exit_code": done.returncode,
            "lines": lines,
            "is_clear": done.returncode == 2 and len(lines) == 1 and names in lines[0],
            "seconds": round(time.monotonic() - begun, 1),
        }
        print(f"refused: {mistake}: {lines[-1] if lines else 'nothing'}", file=sys.stderr)
    return {
        "all_clear": all(one["is_clear"] for one in found.values()),
        "trials_begun": len(list((storage / name / "tune").glob("trials/*"))),
        "mistakes": found,
    }


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ("demo", "asha", "overhead", "killed", "pbt", "refused")
    parser.add_argument("--row", choices=names, required=True)
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="with the demo's run")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--searches", type=int, default=1, help="demo: with other search seeds")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    given = parser.parse_args()
    storage = given.storage.resolve()
    if not (storage / "demo" / "pretrain" / "model" / "config.json").exists():
        raise SystemExit(f"tune.py: {storage}/demo has no model; run `raybert demo` first")
    rows = {
        "demo": lambda: demo(storage, given.searches),
        "asha": lambda: asha(storage, given.trials),
        "overhead": lambda: overhead(storage, given.trials),
        "killed": lambda: killed(storage, given.trials, given.seed),
        "pbt": lambda: pbt(storage),
        "refused": lambda: refused(storage),
    }
    result = {"row": given.row, **origin(), **rows[given.row]()}
    print(json.dumps(result) if given.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
