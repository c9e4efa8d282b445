"""A run that scales from 1 to 3 to 2 workers as nodes join and fail, and a run of a fixed size.

    sudo .venv/bin/python benchmarks/elastic.py --json

Uses the cluster of `nodes.py`, one worker per node: two nodes join during the run, later one fails.
Prints one JSON object: `digests_equal` (of every micro-batch of every step),
`largest_loss_difference` over all evaluations, `workers` of each attempt, and `seconds` from a
change of the nodes to steps with the new number of workers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from itertools import groupby
from typing import Any

from faults import Watcher, experiment, finished, same_digests, say
from nodes import Cluster, refusal
from origin import origin

from raybert.storage.folder import Folder
from raybert.train.metrics_log import read_metrics

PHASE_STEPS = 20  # at least, with each number of workers
TIMEOUT_SECONDS = 400
EVALUATIONS = 20


def losses(run: Any) -> dict[int, float]:
    """The held-out loss at every evaluation, by step."""
    return {r["step"]: r["loss"] for r in read_metrics(Folder(run)) if r["kind"] == "eval"}


class Change:
    """Adds two nodes, later kills one, each after PHASE_STEPS with the workers before."""

    def __init__(self, cluster: Cluster, watcher: Watcher) -> None:
        self._cluster, self._watcher = cluster, watcher
        self.seconds: dict[str, float] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        if not self._reaches(1):
            return
        for node in self._cluster.workers[1:]:
            node.wanted = True
            node.start()
        say("two nodes join")
        begun = time.monotonic()
        if not self._reaches(3):
            return
        self.seconds["1 to 3"] = round(time.monotonic() - begun, 1)
        last = [node for node in self._cluster.workers if node.pids("RayTrainWorker")][-1]
        last.wanted = False
        last.kill()
        say("a node is killed")
        begun = time.monotonic()
        if self._reaches(2, steps=1):
            self.seconds["3 to 2"] = round(time.monotonic() - begun, 1)
            say("two workers train")

    def _reaches(self, workers: int, steps: int = PHASE_STEPS) -> bool:
        """Wait until an attempt with so many workers has taken `steps`; False after a timeout."""
        ends = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < ends:
            sizes = sizes_of(self._watcher)
            taken = [a for a, r in self._watcher.records() if r["kind"] == "train"]
            if sizes and sizes[max(sizes)] == workers and taken.count(max(sizes)) >= steps:
                return True
            time.sleep(0.2)
        return False


def sizes_of(watcher: Watcher) -> dict[int, int]:
    """The number of workers of each attempt."""
    starts = [(a, r) for a, r in watcher.records() if r.get("event") == "start"]
    return {attempt: record["workers"] for attempt, record in starts}


def main() -> None:
    """Run both and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    given = parser.parse_args()
    why = refusal()
    if why is not None:
        raise SystemExit(f"elastic.py: {why}")
    with Cluster(3, cpus=1, head_cpus=1) as cluster:
        disk = cluster.disk.path
        for name, workers in (("fixed", 2), ("elastic", {"min": 1, "max": 3})):
            values = experiment(disk, name, given.steps, 1)
            # Other groups of ranks round their sums differently; bf16 would amplify the difference.
            values["pretrain"] |= {
                "workers": workers,
                "evaluations": EVALUATIONS,
                "precision": "fp32",
            }
            (cluster.folder / f"{name}.yaml").write_text(json.dumps(values))
        say("building the corpus; the run of a fixed size")
        finished(cluster, "corpus", "-c", str(cluster.folder / "fixed.yaml"))
        shutil.copytree(disk / "fixed" / "corpus", disk / "elastic" / "corpus")
        finished(cluster, "pretrain", "-c", str(cluster.folder / "fixed.yaml"))
        for node in cluster.workers[1:]:
            node.wanted = False
            node.kill()
        cluster.wait_for_nodes(2)
        watcher = Watcher(disk / "elastic" / "pretrain")
        say("the elastic run")
        change = Change(cluster, watcher)
        finished(cluster, "pretrain", "-c", str(cluster.folder / "elastic.yaml"))
        sizes = sizes_of(watcher)
        fixed, elastic = (disk / name / "pretrain" for name in ("fixed", "elastic"))
        left, right = losses(fixed), losses(elastic)
        if left.keys() != right.keys():
            raise SystemExit(f"elastic.py: evaluated at {sorted(left)} and at {sorted(right)}")
        result = {
            **origin(),
            "workers": [sizes[attempt] for attempt in sorted(sizes)],
            "digests_equal": same_digests(fixed, elastic),
            "evaluations": len(right),
            "largest_loss_difference": max(abs(left[step] - right[step]) for step in left),
            "seconds": change.seconds,
            "steps": given.steps,
        }
    print(json.dumps(result) if given.json else json.dumps(result, indent=2))
    changes = [size for size, _ in groupby(result["workers"])]
    # The two nodes may join one after the other.
    sys.exit(changes not in ([1, 3, 2], [1, 2, 3, 2]) or not result["digests_equal"])


if __name__ == "__main__":
    main()
