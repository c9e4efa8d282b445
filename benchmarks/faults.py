"""The fault drill: a run that is killed, cut off and refused, against an undisturbed one.

    sudo .venv/bin/python benchmarks/faults.py --seed 0 --faults 20 --json

Builds a cluster of network namespaces (`nodes.py`) with a head and three nodes for workers, makes a
corpus of real sentences there and submits `pretrain` twice: once left alone, once with faults drawn
from the seed: what fails, which of the nodes that train, after how many steps, and in what moment
(between two of them, while a checkpoint is written, while the run evaluates, while the workers
start again). A supervisor starts again what died; where the driver or the head was killed, the
drill submits again, as a user would.
Ends with one JSON object: `identical` (SHA-256 of the finished weights), `digests_equal` (of every
micro-batch of every step, over all attempts), `faults`, each with what it hit and the seconds until
the first new step and where they went, and `manual_steps`. Its exit code is 1 where a fault hit
nothing, or the runs differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from nodes import Cluster, Node, refusal
from origin import origin

from raybert.storage.folder import Folder
from raybert.train.metrics_log import read_metrics
from raybert.train.run_folder import read_digests

KINDS = ("worker", "raylet", "node", "driver", "network", "storage")
MOMENTS = ("step", "checkpoint", "evaluation", "start-up")
CUT_SECONDS, REFUSED_SECONDS, NOTICE_SECONDS = 30, 60, 30
ORPHANED_SECONDS = 90  # that workers train on without a head, at most
STEPS_BETWEEN = (6, 14)  # new steps between a recovery and the next fault
STEPS_A_SECOND = 3  # at most, so that a run does not end before its faults
PATIENCE_SECONDS = 600  # without a new step, the drill gives up
STEPS_AN_EVALUATION = 12


@dataclass
class Fault:
    """One fault, as drawn and as it went; times in seconds."""

    kind: str
    moment: str
    node: int  # as drawn; as it went, the one that was struck
    after: int  # new steps
    hit: bool = False  # whether there was what it was to strike
    step: int | None = None  # the last logged one when it struck
    at: float | None = None  # since the run was submitted
    noticed: float | None = None  # until the user was told of a restart
    restarted: float | None = None  # until the workers' new attempt began
    recovered: float | None = None  # until the first step after it; None: the next came before


def draw(seed: int, count: int, kinds: list[str], workers: int) -> list[Fault]:
    """Draw the faults: every kind as often as any other, in a random order."""
    rng = random.Random(seed)
    drawn = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(drawn)
    faults: list[Fault] = []
    for kind in drawn:
        moments = ["step", "step", "checkpoint", "evaluation"]
        if faults and faults[-1].kind in ("worker", "raylet", "node"):
            moments.append("start-up")
        moment = rng.choice(moments)
        faults.append(Fault(kind, moment, rng.randint(1, workers), rng.randint(*STEPS_BETWEEN)))
    return faults


def evaluations(steps: int) -> int:
    """How often a run of so many steps is evaluated: often enough to be met there."""
    return max(2, steps // STEPS_AN_EVALUATION)


def experiment(storage: Path, name: str, steps: int, workers: int) -> dict[str, Any]:
    """The run's configuration: small, on real sentences, deterministic."""
    return {
        "run": {"name": name, "storage": str(storage)},
        "corpus": {
            "source": {"path": "sample:rotten-tomatoes"},
            "tokenizer": {"vocab_size": 2000},
            "seq_len": 64,
            "rows_per_part": 512,
            "rows_per_group": 16,
        },
        "model": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "max_seq_len": 64},
        "pretrain": {
            "steps": steps,
            "global_batch_size": 96,
            "micro_batch_size": 8,
            "workers": workers,
            "threads": 1,
            "deterministic": True,
            "digests": True,
            "log_every": 1,
            "evaluations": evaluations(steps),
            "evaluation_rows": 512,
            "examples": [],
            "checkpoint_steps": 4,
            "checkpoint_minutes": None,
            "collective_timeout_s": 30,
            "max_failures": 20,
        },
    }


class Watcher:
    """Sees how far a run has come, in its folder."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """All records of all attempts, each with its attempt."""
        found = []
        for path in sorted((self.run / "metrics").glob("*.jsonl")):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    found.append((int(path.stem), json.loads(line)))
                except ValueError:
                    continue  # cut off in mid-line
        return found

    def last(self) -> tuple[int, int, float]:
        """The youngest attempt that has taken a step, its last step, and when that was logged."""
        steps = [(a, r["step"], r["time"]) for a, r in self.records() if r["kind"] == "train"]
        return max(steps, default=(0, 0, 0.0))

    def begun(self) -> int:
        """How many attempts have begun."""
        return len(list((self.run / "attempts").glob("*.json")))

    def is_writing(self) -> bool:
        """Whether a checkpoint lies there that is not committed."""
        folder = self.run / "checkpoints"
        named = {path.stem for path in folder.glob("step-*.json")}
        return any(p.name[:13] not in named for p in folder.glob("step-*-a*"))


class Drill:
    """The disturbed run."""

    def __init__(self, cluster: Cluster, config: Path, run: Path, faults: list[Fault]) -> None:
        self._cluster, self._config, self._run = cluster, config, run
        self._faults, self._watcher = faults, Watcher(run)
        self._steps = json.loads(config.read_text())["pretrain"]["steps"]
        self.manual_steps: list[str] = []
        self._over = threading.Event()
        self._expected: str | None = None  # why a submission may end early
        self._told: list[float] = []  # when the user was told of a restart
        self._begun = time.time()

    def go(self) -> dict[str, Any]:
        """Submit, disturb, submit again where that is a user's part, until the run is finished."""
        disturber = threading.Thread(target=self._disturb, daemon=True)
        disturber.start()
        while True:
            process = self._cluster.begin(
                *("submit", "pretrain", "-c", str(self._config), "--json"), stdout=-1, stderr=-1
            )
            assert process.stdout is not None and process.stderr is not None
            listener = threading.Thread(target=self._listen, args=[process.stderr])
            listener.start()
            out = process.stdout.read()
            process.wait()
            listener.join()
            if process.returncode == 0:
                break
            why = self._expected or f"ended with {process.returncode}: {out.strip()[-300:]}"
            self._expected = None
            self.manual_steps.append(f"submitted again: {why}")
            say(self.manual_steps[-1])
            if len(self.manual_steps) > 3 * len(self._faults) + 3:
                raise SystemExit("the run can't be brought to its end")
            self._cluster.wait_for_head()
        self._over.set()
        disturber.join()
        return dict(json.loads(out.strip().splitlines()[-1]))

    def _disturb(self) -> None:
        for number, fault in enumerate(self._faults, 1):
            if not self._wait_for(fault):
                say(f"fault {number} and those after it found no moment")
                return
            attempt, step, _ = self._watcher.last()
            struck, begun = time.time(), self._watcher.begun()
            fault.step, fault.at = step, round(struck - self._begun, 1)
            say(f"fault {number}/{len(self._faults)}: {fault.kind}, in mid-{fault.moment}, "
                f"step {step}")  # fmt: skip
            fault.hit = self._strike(fault)
            if not fault.hit:
                say("  it hit nothing")
                continue
            following = self._faults[number] if number < len(self._faults) else None
            if following is not None and following.moment == "start-up":
                self._until(lambda begun=begun: self._watcher.begun() > begun)
                continue  # the next one strikes before this one's recovery
            if fault.kind not in ("network", "storage"):  # nobody survives these
                self._until(lambda attempt=attempt: self._watcher.last()[0] > attempt)
            self._until(lambda at=(attempt, step), t=struck: self._is_past(at, t))
            fault.noticed = next((round(t - struck, 1) for t in self._told if t > struck), None)
            again = [r["time"] for a, r in self._watcher.records()
                     if r.get("event") == "start" and r["time"] > struck]  # fmt: skip
            fault.restarted = round(min(again) - struck, 1) if again else None
            new = [
                r["time"]
                for a, r in self._watcher.records()
                if r["kind"] == "train" and r["time"] > struck and (a > attempt or not again)
            ]
            fault.recovered = round(min(new) - struck, 1) if new else None
            say(f"  first new step after {fault.recovered} s")

    def _listen(self, lines: IO[str]) -> None:
        """Show what the submission says, and note when it speaks of a restart."""
        for line in lines:
            if "starting again" in line:
                self._told.append(time.time())
            print(line, end="", file=sys.stderr, flush=True)

    def _wait_for(self, fault: Fault) -> bool:
        """Wait for a fault's moment; False where the run ends before."""
        watcher = self._watcher
        if fault.moment == "start-up":
            return not self._over.is_set()
        first = watcher.last()[1] + fault.after
        if not self._until(lambda: watcher.last()[1] >= first):
            return False
        if fault.moment == "checkpoint":
            return self._until(watcher.is_writing, pause=0.005)
        if fault.moment == "evaluation":
            count = evaluations(self._steps)
            due = {round(self._steps * i / count) for i in range(1, count)}
            return self._until(lambda: watcher.last()[1] in due, pause=0.02)
        return True

    def _is_past(self, before: tuple[int, int], struck: float) -> bool:
        """Whether a step was taken after a fault: by a new attempt, or past what was in flight."""
        attempt, step, when = self._watcher.last()
        return when > struck and (attempt > before[0] or step > before[1] + 2)

    def _until(self, holds: Callable[[], bool], pause: float = 0.1) -> bool:
        ends = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            if self._over.is_set() or time.monotonic() > ends:
                return False
            time.sleep(pause)
        return True

    def _strike(self, fault: Fault) -> bool:
        """Do it, to a node that trains; return whether there was anything to strike."""
        cluster = self._cluster
        if fault.kind == "head":
            self._expected = "the head was lost"
            cluster.head.kill()
        elif fault.kind == "driver":
            self._expected = "the driver was killed"
            if not kill_one(cluster.head, "-m raybert pretrain"):
                self._expected = None
                return False
        elif fault.kind == "storage":
            cluster.disk.refuse()
            time.sleep(REFUSED_SECONDS)
            cluster.disk.accept()
        else:
            return self._strike_node(fault)
        return True

    def _strike_node(self, fault: Fault) -> bool:
        training: list[Node] = []
        ends = time.monotonic() + 60
        while not training and time.monotonic() < ends:  # workers may be about to start
            training = [n for n in self._cluster.workers if n.pids("RayTrainWorker")]
        if not training:
            return False
        node = training[fault.node % len(training)]
        fault.node = node.index
        if fault.kind == "worker":
            return kill_one(node, "RayTrainWorker")
        if fault.kind == "raylet":
            return kill_one(node, "raylet/raylet")
        if fault.kind == "node":
            node.kill()
        elif fault.kind == "preemption":
            self._cluster.drain(node, NOTICE_SECONDS)
        elif fault.kind == "network":
            node.cut()
            time.sleep(CUT_SECONDS)
            node.mend()
        return True


def kill_one(node: Node, word: str) -> bool:
    """SIGKILL the youngest process with a word in its command line, once there is one."""
    ends = time.monotonic() + 60
    while not (pids := node.pids(word)):
        if time.monotonic() > ends:
            say(f"  nothing to kill: no {word} in {node.name}")
            return False
        time.sleep(0.2)
    os.kill(pids[-1], signal.SIGKILL)
    return True


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def weights_of(run: Path) -> str:
    """The SHA-256 of the finished model's weights."""
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def same_digests(left: Path, right: Path) -> bool:
    """Whether two runs trained on the same micro-batches, in every attempt of theirs."""
    first, second = (read_digests(Folder(run)) for run in (left, right))
    return first == second and all(len(found) == 1 for found in first.values())


def finished(cluster: Cluster, *words: str) -> dict[str, Any]:
    """Submit a command that nothing disturbs, and return what it ends with.

    Raises:
        SystemExit: it fails.
    """
    process = cluster.begin("submit", *words, "--json", stdout=-1)
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"submit {words[0]} ended with {process.returncode}: {out[-500:]}")
    return dict(json.loads(out.strip().splitlines()[-1]))


def main() -> None:
    """Run the drill."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="of these; also `head`, `preemption`"
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: enough for the faults")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    given = parser.parse_args()
    why = refusal()
    if why is not None:
        raise SystemExit(f"faults.py: {why}")
    faults = draw(given.seed, given.faults, given.kinds.split(","), given.workers)
    # Training goes on while the storage refuses or there is no head, and may in the other cases.
    seconds = sum(
        {
            "storage": REFUSED_SECONDS,
            "network": CUT_SECONDS,
            "head": ORPHANED_SECONDS,
            "preemption": NOTICE_SECONDS,
        }.get(f.kind, 0)
        for f in faults
    )
    steps = given.steps or 40 + sum(f.after + 4 for f in faults) + STEPS_A_SECOND * seconds
    with Cluster(given.workers, head_cpus=0) as cluster:
        disk, configs = cluster.disk.path, {}
        for name in ("quiet", "drill"):
            configs[name] = cluster.folder / f"{name}.yaml"
            values = experiment(disk, name, steps, given.workers)
            configs[name].write_text(json.dumps(values))
        say(f"{len(faults)} faults in {steps:,} steps; the corpus")
        finished(cluster, "corpus", "-c", str(configs["quiet"]))
        shutil.copytree(disk / "quiet" / "corpus", disk / "drill" / "corpus")
        say("the undisturbed run")
        quiet = finished(cluster, "pretrain", "-c", str(configs["quiet"]))
        say("the disturbed run")
        drill = Drill(cluster, configs["drill"], disk / "drill" / "pretrain", faults)
        ended = drill.go()
        runs = [disk / name / "pretrain" for name in ("quiet", "drill")]
        hashes = [weights_of(run) for run in runs]
        recovered = [f.recovered for f in faults if f.kind == "worker" and f.recovered is not None]
        result = {
            **origin(),
            "identical": hashes[0] == hashes[1],
            "digests_equal": same_digests(*runs),
            "weights": hashes,
            "steps": steps,
            "restarts": ended["result"]["restarts"],
            "seconds": {"undisturbed": quiet["ended"] - quiet["begun"],
                        "disturbed": round(time.time() - drill._begun, 1)},
            "faults_hit": sum(fault.hit for fault in faults),
            "worker_recovery_s": {"median": median(recovered), "max": max(recovered),
                                  "count": len(recovered)} if recovered else None,
            "faults": [asdict(fault) for fault in faults],
            "manual_steps": drill.manual_steps,
            "events": [r for r in read_metrics(Folder(runs[1])) if r["kind"] == "event"],
        }  # fmt: skip
    if given.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=2))
    as_it_should = result["identical"] and result["digests_equal"] and all(f.hit for f in faults)
    sys.exit(not as_it_should)


if __name__ == "__main__":
    main()
