"""Fault injection: a run under process, node, network and storage faults, and one without.

    sudo .venv/bin/python benchmarks/faults.py --seed 0 --faults 20 --json

Builds a cluster of network namespaces (`nodes.py`) with a head and three worker nodes, builds a
corpus of real sentences there and submits `pretrain` twice: once without faults, once with faults
drawn from the seed: the kind, the training node, the number of steps before it, and the moment
(between two steps, while a checkpoint is written, during an evaluation, while workers restart). A
supervisor restarts nodes that died; after a fault of the driver or the head, the script submits
again, as a user would.
Prints one JSON object: `identical` (SHA-256 of the final weights), `digests_equal` (of every
micro-batch of every step, over all attempts), `faults`, each with its target, the seconds until the
first new step and their parts, and `manual_steps`. The exit code is 1 if a fault had no target or
the runs differ.
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
ORPHANED_SECONDS = 90  # at most, that workers train without a head
STEPS_BETWEEN = (6, 14)  # new steps between a recovery and the next fault
STEPS_PER_SECOND = 3  # an upper bound, so that the run is long enough for all faults
TIMEOUT_SECONDS = 600  # of each wait
STEPS_PER_EVALUATION = 12


@dataclass
class Fault:
    """A fault as drawn, and its effects; times in seconds."""

    kind: str
    moment: str
    node: int  # as drawn; afterwards the node that was hit
    after: int  # steps since the last recovery
    hit: bool = False  # whether its target existed
    step: int | None = None  # the last logged step at the fault
    at: float | None = None  # since the submission
    noticed: float | None = None  # until the user saw the restart's message
    restarted: float | None = None  # until the new attempt began
    recovered: float | None = None  # until the next step; None: the next fault came before


def draw(seed: int, count: int, kinds: list[str], workers: int) -> list[Fault]:
    """Draw the faults: all kinds equally often, in random order."""
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
    """The number of evaluations, high enough that faults can hit one."""
    return max(2, steps // STEPS_PER_EVALUATION)


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
    """Reads a run's progress from its folder."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """All attempts' records, each with its attempt."""
        found = []
        for path in sorted((self.run / "metrics").glob("*.jsonl")):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    found.append((int(path.stem), json.loads(line)))
                except ValueError:
                    continue  # a truncated line
        return found

    def last(self) -> tuple[int, int, float]:
        """The latest attempt that has taken a step, its last step, and the time it was logged."""
        steps = [(a, r["step"], r["time"]) for a, r in self.records() if r["kind"] == "train"]
        return max(steps, default=(0, 0, 0.0))

    def begun(self) -> int:
        """The number of attempts that have begun."""
        return len(list((self.run / "attempts").glob("*.json")))

    def is_writing(self) -> bool:
        """Whether there is an uncommitted checkpoint."""
        folder = self.run / "checkpoints"
        named = {path.stem for path in folder.glob("step-*.json")}
        return any(p.name[:13] not in named for p in folder.glob("step-*-a*"))


class Drill:
    """The run with faults."""

    def __init__(self, cluster: Cluster, config: Path, run: Path, faults: list[Fault]) -> None:
        self._cluster, self._config, self._run = cluster, config, run
        self._faults, self._watcher = faults, Watcher(run)
        self._steps = json.loads(config.read_text())["pretrain"]["steps"]
        self.manual_steps: list[str] = []
        self._over = threading.Event()
        self._expected: str | None = None  # the reason for which a submission may fail
        self._notices: list[float] = []  # times of messages about a restart
        self._begun = time.time()

    def run(self) -> dict[str, Any]:
        """Submit and inject faults, submit again where a user would, until the run is finished."""
        injector = threading.Thread(target=self._inject_faults, daemon=True)
        injector.start()
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
                raise SystemExit("the run does not finish")
            self._cluster.wait_for_head()
        self._over.set()
        injector.join()
        return dict(json.loads(out.strip().splitlines()[-1]))

    def _inject_faults(self) -> None:
        for number, fault in enumerate(self._faults, 1):
            if not self._wait_for(fault):
                say(f"fault {number} and later ones: the run ended before")
                return
            attempt, step, _ = self._watcher.last()
            struck, begun = time.time(), self._watcher.begun()
            fault.step, fault.at = step, round(struck - self._begun, 1)
            say(f"fault {number}/{len(self._faults)}: {fault.kind}, in mid-{fault.moment}, "
                f"step {step}")  # fmt: skip
            fault.hit = self._inject(fault)
            if not fault.hit:
                say("  no target")
                continue
            following = self._faults[number] if number < len(self._faults) else None
            if following is not None and following.moment == "start-up":
                self._until(lambda begun=begun: self._watcher.begun() > begun)
                continue  # the next fault comes before this one's recovery
            if fault.kind not in ("network", "storage"):  # the others start a new attempt
                self._until(lambda attempt=attempt: self._watcher.last()[0] > attempt)
            self._until(lambda at=(attempt, step), t=struck: self._is_past(at, t))
            fault.noticed = next((round(t - struck, 1) for t in self._notices if t > struck), None)
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
        """Print the submission's output, and record the times of messages about a restart."""
        for line in lines:
            if "starting again" in line:
                self._notices.append(time.time())
            print(line, end="", file=sys.stderr, flush=True)

    def _wait_for(self, fault: Fault) -> bool:
        """Wait for a fault's moment; False if the run ends before."""
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
        """Whether a step came after a fault: of a new attempt, or beyond the steps in flight."""
        attempt, step, when = self._watcher.last()
        return when > struck and (attempt > before[0] or step > before[1] + 2)

    def _until(self, holds: Callable[[], bool], pause: float = 0.1) -> bool:
        ends = time.monotonic() + TIMEOUT_SECONDS
        while not holds():
            if self._over.is_set() or time.monotonic() > ends:
                return False
            time.sleep(pause)
        return True

    def _inject(self, fault: Fault) -> bool:
        """Inject a fault into a training node; return whether there was a target."""
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
            return self._inject_into_node(fault)
        return True

    def _inject_into_node(self, fault: Fault) -> bool:
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
    """Send SIGKILL to the latest process with a word in its command line, once there is one."""
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
    """Whether two runs trained on the same micro-batches in all attempts."""
    first, second = (read_digests(Folder(run)) for run in (left, right))
    return first == second and all(len(found) == 1 for found in first.values())


def finished(cluster: Cluster, *words: str) -> dict[str, Any]:
    """Submit a command without faults, and return its result.

    Raises:
        SystemExit: it fails.
    """
    process = cluster.begin("submit", *words, "--json", stdout=-1)
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"submit {words[0]} ended with {process.returncode}: {out[-500:]}")
    return dict(json.loads(out.strip().splitlines()[-1]))


def main() -> None:
    """Run without and with faults, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="kinds of faults; also `head`, `preemption`"
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: enough for all faults")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    given = parser.parse_args()
    why = refusal()
    if why is not None:
        raise SystemExit(f"faults.py: {why}")
    faults = draw(given.seed, given.faults, given.kinds.split(","), given.workers)
    # Training continues while the storage is full or the head is down, and may in other cases.
    seconds = sum(
        {
            "storage": REFUSED_SECONDS,
            "network": CUT_SECONDS,
            "head": ORPHANED_SECONDS,
            "preemption": NOTICE_SECONDS,
        }.get(f.kind, 0)
        for f in faults
    )
    steps = given.steps or 40 + sum(f.after + 4 for f in faults) + STEPS_PER_SECOND * seconds
    with Cluster(given.workers, head_cpus=0) as cluster:
        disk, configs = cluster.disk.path, {}
        for name in ("quiet", "drill"):
            configs[name] = cluster.folder / f"{name}.yaml"
            values = experiment(disk, name, steps, given.workers)
            configs[name].write_text(json.dumps(values))
        say(f"{len(faults)} faults in {steps:,} steps; building the corpus")
        finished(cluster, "corpus", "-c", str(configs["quiet"]))
        shutil.copytree(disk / "quiet" / "corpus", disk / "drill" / "corpus")
        say("the run without faults")
        quiet = finished(cluster, "pretrain", "-c", str(configs["quiet"]))
        say("the run with faults")
        drill = Drill(cluster, configs["drill"], disk / "drill" / "pretrain", faults)
        ended = drill.run()
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
    is_ok = result["identical"] and result["digests_equal"] and all(f.hit for f in faults)
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
