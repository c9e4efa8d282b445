"""The time and memory of a worker to start or resume anywhere in a corpus of ten billion rows.

    python benchmarks/plan.py --json

Makes a corpus of 10,000 parts of a million rows, as sparse files that take no disk space but have
the manifest, layout and row-group offsets of real parts. Then some of 64 workers start at the first
step and at random steps of three epochs, each in a fresh process, one at a time. After its imports,
a worker reads the manifest and the tokenizer, builds its plan and makes its micro-batches of the
first step; then it continues to the end of some windows. Prints one JSON object: the maximum over
the workers of the seconds until the first step, of the memory (peak resident set above that after
the imports), and of the ratio of the bytes read, as the kernel counts them, to the bytes of the
rows that the steps used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from origin import origin

from raybert.data.corpus.manifest import MANIFEST, Manifest, PartFile
from raybert.data.corpus.parts import PartReader
from raybert.data.loader import BatchPlan
from raybert.data.masking import MaskingConfig, Vocabulary
from raybert.data.order import CorpusOrder, assign_to_ranks
from raybert.data.tokenizer import Tokenizer
from raybert.storage.folder import Folder

VOCAB_SIZE = 30_000
EPOCHS = 3


def make(folder: Folder, parts: int, rows_per_part: int, seq_len: int) -> None:
    """Write a small corpus, and replace its training split by sparse parts."""
    from raybert.pipeline.benchmarks import (
        generate_corpus,  # imports torch, which the workers don't need
    )

    manifest = generate_corpus(folder, 64, seq_len, VOCAB_SIZE)
    split = manifest.splits["train"]
    [small], layout = split.parts, split.layout
    assert layout is not None
    groups = (rows_per_part - small.rows) // split.rows_per_group  # beyond those of the small part
    size = small.bytes + groups * layout.stride
    made = []
    for index in range(parts):
        name = f"train-{index:05d}.parquet"
        with open(folder.join(name), "wb") as file:
            file.truncate(size)
        digest = hashlib.sha256(name.encode()).hexdigest()  # a placeholder: it is not checked
        made.append(PartFile(name=name, rows=rows_per_part, bytes=size, sha256=digest))
    large = {"rows": parts * rows_per_part, "rows_per_part": rows_per_part, "parts": made}
    splits = {**manifest.splits, "train": split.model_copy(update=large)}
    folder.write_json(MANIFEST, manifest.model_copy(update={"splits": splits}).model_dump())


def plan_of(folder: Folder, manifest: Manifest, arguments: argparse.Namespace) -> BatchPlan:
    """Build a worker's plan."""
    reader = PartReader(folder, manifest, "train")
    order = CorpusOrder(
        rows=reader.rows,
        rows_per_group=reader.rows_per_group,
        global_batch_size=arguments.global_batch_size,
        micro_batch_size=arguments.micro_batch_size,
        seed=0,
    )
    tokenizer = Tokenizer.load(folder)
    vocabulary = Vocabulary(tokenizer.mask_id, tokenizer.is_special)
    return BatchPlan(reader, order, MaskingConfig(), vocabulary, EPOCHS * order.steps_per_epoch)


def measure(folder: Folder, rank: int, step: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a worker that starts at a step, in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    memory = _status("VmRSS")
    began = time.perf_counter()
    manifest = Manifest.read(folder)
    manifest_seconds = time.perf_counter() - began
    plan = plan_of(folder, manifest, arguments)
    plan_seconds = time.perf_counter() - began - manifest_seconds
    indices = assign_to_ranks(plan.order.micro_batches_per_step, arguments.workers)[rank]
    ends = _window_ends(plan.order, step, arguments.windows)
    before = _bytes_read()
    batches = plan.micro_batches(indices, range(step, ends[-1]))
    begun = next(batches)
    seconds = time.perf_counter() - began
    first = _bytes_read() - before
    # A worker may need only a part of its first window, and all of the later ones.
    rows = [0, 0]
    for number, made in enumerate(chain([begun], batches), step):
        rows[number >= ends[0]] += sum(len(batch.row_ids) for batch in made)
    later = _bytes_read() - before - first
    width = manifest.seq_len * 2 + (manifest.seq_len + 7) // 8  # ids, and one bit for each
    return {
        "rank": rank,
        "step": step,
        "seconds": round(seconds, 4),
        "manifest_seconds": round(manifest_seconds, 4),
        "plan_seconds": round(plan_seconds, 4),
        "peak_mib": round((_status("VmHWM") - memory) / 2**20, 1),
        "read_to_used": round((first + later) / (sum(rows) * width), 4),
        "first_window_read_to_used": round(first / (rows[0] * width), 4),
        "later_windows_read_to_used": round(later / max(1, rows[1] * width), 4),
    }


def _window_ends(order: CorpusOrder, step: int, windows: int) -> list[int]:
    """The steps at which `windows` windows end, from the one of `step` on."""
    ends = []
    for _ in range(windows):
        step = order.steps_of(*order.window_of(step)).stop
        ends.append(step)
    return ends


def _status(field: str) -> int:
    """A size in this process's `/proc` status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _bytes_read() -> int:
    """The bytes that this process has read from files, cached or not."""
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def travel(folder: Folder, arguments: argparse.Namespace) -> dict[str, Any]:
    """The driver's time for checking all parts, and the size of the plan that operators receive."""
    manifest = Manifest.read(folder)
    plan = plan_of(folder, manifest, arguments)
    began = time.perf_counter()
    plan.reader.check()
    checked = time.perf_counter()
    packed = pickle.dumps(plan)
    dumped = time.perf_counter()
    pickle.loads(packed)
    loaded = time.perf_counter()
    return {
        "rows": plan.order.rows,
        "parts": len(manifest.splits["train"].parts),
        "slots": plan.order.micro_batches_per_step,
        "window_rows": plan.order.window_rows,
        "steps_per_epoch": plan.order.steps_per_epoch,
        "manifest_bytes": folder.size(MANIFEST),
        "check_seconds": round(checked - began, 4),
        "plan_bytes": len(packed),
        "pack_seconds": round(dumped - checked, 4),
        "unpack_seconds": round(loaded - dumped, 4),
    }


def starts(steps_per_epoch: int, arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """(rank, step) of the workers to start: some ranks, each at step 0 and at random steps."""
    draw = random.Random(arguments.seed)
    last = arguments.workers - 1
    ranks = sorted({0, last // 3, 2 * last // 3, last})
    steps = [0, *(draw.randrange(EPOCHS * steps_per_epoch) for _ in range(arguments.resumes))]
    return [(rank, step) for step in steps for rank in ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--rows-per-part", type=int, default=1_000_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--global-batch-size", type=int, default=8192)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8, help="that each worker runs for")
    parser.add_argument("--resumes", type=int, default=4, help="random steps, for each rank")
    parser.add_argument("--seed", type=int, default=0, help="of the random steps")
    parser.add_argument("--storage", help="the folder of the corpus; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is printed")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # folder, rank, step
    arguments = parser.parse_args()
    if arguments.measure:
        folder, rank, step = arguments.measure
        print(json.dumps(measure(Folder(folder), int(rank), int(step), arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="plan-", dir=arguments.storage) as scratch:
        folder = Folder(scratch)
        make(folder, arguments.parts, arguments.rows_per_part, arguments.seq_len)
        result = travel(folder, arguments)
        measured = []
        for rank, step in starts(result["steps_per_epoch"], arguments):
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += ["--measure", scratch, str(rank), str(step)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            measured.append(found)
            print(
                f"worker {rank:2} at step {step:9,}: {found['seconds']:.3f} s, "
                f"{found['peak_mib']:.0f} MiB, {found['read_to_used']:.3f} bytes read a byte used",
                file=sys.stderr,
                flush=True,
            )
    result = {
        **origin(),
        **result,
        "workers": arguments.workers,
        "start_seconds": max(m["seconds"] for m in measured if not m["step"]),
        "resume_seconds": max(m["seconds"] for m in measured if m["step"]),
        "peak_mib": max(m["peak_mib"] for m in measured),
        "read_to_used": max(m["read_to_used"] for m in measured),
        "measured": measured,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
