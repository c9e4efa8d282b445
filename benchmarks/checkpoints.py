"""The cost of a checkpoint: how long training stalls, and how much writing slows the next steps.

    python benchmarks/checkpoints.py --json

Trains the bare loop on generated words, a model of 30 million parameters, with a checkpoint every
two minutes. Each minute that begins with a checkpoint is compared with the minutes before and after
it, which have none, so that drift of the machine's speed cancels. Prints one JSON object: for each
checkpoint the seconds that the next step waited (for the previous checkpoint, the copy of the state
and the writing thread), the seconds of writing in parallel with steps, and the time lost in all;
the longest wait, and the median ratio of throughput with a checkpoint every minute to throughput
without.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from origin import origin

from raybert.cluster.machine import describe_machine, keep_freed_memory
from raybert.config import build
from raybert.model.settings import ModelConfig
from raybert.pipeline.benchmarks import generate_corpus
from raybert.storage.folder import Folder
from raybert.tasks.masked_lm import PretrainSpec
from raybert.tasks.settings import PretrainConfig
from raybert.terminal.display import Display
from raybert.train.checkpoint import CheckpointStore, Snapshot
from raybert.train.distributed import Group, use_threads
from raybert.train.loop import Loop
from raybert.train.run_folder import begin_attempt
from raybert.train.task import ControlSignals, LoaderConfig, Stopped

SEQ_LEN, VOCAB_SIZE, ROWS = 128, 21_504, 32  # rows a step
SHAPE = {"hidden_size": 512, "num_layers": 6, "num_heads": 8, "max_seq_len": SEQ_LEN}


@dataclass
class Checkpoint:
    """The times of one checkpoint, in seconds of one clock."""

    step: int
    began: float
    copied: float  # duration of copying the state
    stalled: float  # delay of the next step, copying included
    bytes: int
    written: float = 0.0  # duration of writing, in parallel with the next steps
    ended: float = float("inf")  # end of writing


class TimedLoop(Loop):
    """Records how long each checkpoint stalls training."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.checkpoints: list[Checkpoint] = []
        self.copied, self.bytes = 0.0, 0

    def snapshot(self) -> Snapshot:
        """Copy the run's state, and record the duration."""
        began = time.perf_counter()
        snapshot = super().snapshot()
        self.copied = time.perf_counter() - began
        tensors = [*snapshot.model.values(), *snapshot.optimizer.values()]
        self.bytes = sum(tensor.nbytes for tensor in tensors)
        return snapshot

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint, and note how long training waits for it."""
        began = time.perf_counter()
        super().save(wait)
        stalled = time.perf_counter() - began
        step = self.progress.step
        self.checkpoints.append(Checkpoint(step, began, self.copied, stalled, self.bytes))


class TimedStore(CheckpointStore):
    """Records when each checkpoint is written."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.writes: dict[int, tuple[float, float]] = {}  # step -> begin and end

    def _write(self, snapshot: Snapshot) -> None:
        began = time.perf_counter()
        super()._write(snapshot)
        self.writes[snapshot.step] = began, time.perf_counter()


def train(
    folder: Folder, interval: float, count: int, threads: int | None, display: Display
) -> tuple[TimedLoop, list[float], dict[str, Any]]:
    """Train until `count` checkpoints have had their interval and the next one.

    Returns:
        The loop, the times at which its steps ended, and the machine's description.
    """
    manifest = generate_corpus(folder / "corpus", 8192, SEQ_LEN, VOCAB_SIZE)
    config = {
        "steps": 1_000_000,  # `is_over` ends the run
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS,
        "packed_documents": "joined",  # a generated row is one document
        "evaluations": 1,
        "evaluation_rows": 2,
        "examples": [],
        "log_every": 1,
        "checkpoint_minutes": 2 * interval / 60,
    }
    job = PretrainSpec(
        build(PretrainConfig, config, "checkpoints"),
        build(ModelConfig, SHAPE, "checkpoints"),
        folder / "corpus",
        manifest,
        "generated words",
    )
    used, group = use_threads(threads, 1), Group()
    keep_freed_memory()
    run = folder / "run"
    attempt = begin_attempt(run)
    store = TimedStore(run, attempt, job.config.keep_checkpoints)
    ends: list[float] = []

    def on_record(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            ends.append(time.perf_counter())
        display.record(record)

    def is_over() -> bool:
        last = loop.checkpoints[count - 1] if len(loop.checkpoints) == count else None
        return last is not None and time.perf_counter() >= last.began + 2 * interval

    loop = TimedLoop(
        job.make_task(group, LoaderConfig()),
        job.config,
        group,
        store,
        on_record=on_record,
        signals=ControlSignals(stop=is_over),
    )
    with suppress(Stopped):
        for _ in loop.evaluations():
            pass
    for checkpoint in loop.checkpoints:
        began, checkpoint.ended = store.writes[checkpoint.step]
        checkpoint.written = checkpoint.ended - began
    return loop, ends, describe_machine(group.device, workers=1, threads=used)


def compare(
    checkpoints: Sequence[Checkpoint], ends: Sequence[float], interval: float
) -> list[dict[str, Any]]:
    """Compare the interval that begins with a checkpoint with those before and after it."""
    steps = list(pairwise(ends))  # (begin, end) of each, waits and logging included
    firsts = [ends[bisect_right(ends, c.began) - 1] for c in checkpoints]
    found = []
    for checkpoint, first, following in zip(
        checkpoints, firsts, [*firsts[1:], float("inf")], strict=True
    ):
        turns = [
            [end - begin for begin, end in steps if low <= begin < high]
            for low, high in (
                (first - interval, first),
                (first, first + interval),
                (first + interval, min(first + 2 * interval, following)),
            )
        ]
        before, during, after = map(fmean, turns)
        without = (before + after) / 2
        beside = [end - begin for begin, end in steps if first <= begin < checkpoint.ended]
        lost = sum(beside) - len(beside) * median(turns[0] + turns[2])
        found.append(
            {
                "step": checkpoint.step,
                "stalled_seconds": round(checkpoint.stalled, 3),
                "copied_seconds": round(checkpoint.copied, 3),
                "written_seconds": round(checkpoint.written, 3),
                "bytes": checkpoint.bytes,
                "steps_beside": len(beside),
                "lost_seconds": round(lost, 3),
                "throughput_ratio": round(without / during, 4),
                "step_seconds": round(during, 4),
                "step_seconds_without": round(without, 4),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interval", type=float, default=60, help="seconds of each interval")
    parser.add_argument("--minutes", type=float, default=12, help="total; 12 measure 5 checkpoints")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--storage", default=".", help="a folder on the disk to measure")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is printed")
    arguments = parser.parse_args()
    interval = arguments.interval
    count = int(arguments.minutes * 60 / interval / 2) - 1  # the first two intervals are warm-up
    if count < 1:
        parser.error(f"--minutes {arguments.minutes:g}: one checkpoint takes four intervals")
    display = Display()
    with (
        tempfile.TemporaryDirectory(prefix="checkpoints-", dir=arguments.storage) as scratch,
        display.stage("train"),
    ):
        disk = ["stat", "--file-system", "--format=%T", scratch]
        filesystem = subprocess.run(disk, check=True, stdout=subprocess.PIPE, text=True).stdout
        loop, ends, machine = train(Folder(scratch), interval, count, arguments.threads, display)
    found = compare(loop.checkpoints[:count], ends, interval)
    tokens = ROWS * SEQ_LEN
    result = {
        **origin(),
        "parameters": sum(p.numel() for p in loop.task.model.parameters()),
        "bytes": found[0]["bytes"],
        "interval_seconds": interval,
        "stalled_seconds": max(c["stalled_seconds"] for c in found),
        "written_seconds": median(c["written_seconds"] for c in found),
        "lost_seconds": median(c["lost_seconds"] for c in found),
        "throughput_ratio": median(c["throughput_ratio"] for c in found),
        "tokens_per_second": round(tokens / median(c["step_seconds"] for c in found)),
        "tokens_per_second_without": round(
            tokens / median(c["step_seconds_without"] for c in found)
        ),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "filesystem": filesystem.strip(),
        "machine": machine,
        "checkpoints": found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
