"""Peak memory of pretraining on a corpus, and on one a hundred times as large.

    python benchmarks/memory.py --json

Pretrains a small model with two workers on generated corpora, each in its own process and Ray with
an object store of the same size. Prints one JSON object: the peaks in MiB (all processes' PSS
without shared memory, plus the object store in use), and their ratio, which should be about 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from meter import Meter

from raybert.cluster.session import RayConfig, ray_session
from raybert.config import build
from raybert.model.settings import ModelConfig
from raybert.pipeline.benchmarks import generate_corpus
from raybert.storage.folder import Folder
from raybert.tasks.masked_lm import PretrainSpec
from raybert.tasks.settings import PretrainConfig
from raybert.train.ray.driver import train_on_ray

SEQ_LEN, VOCAB_SIZE = 128, 8192


def measure(rows: int, steps: int) -> dict[str, Any]:
    """Pretrain on a corpus of `rows` rows; return the peak memory in MiB."""
    with tempfile.TemporaryDirectory(prefix="raybert-memory-") as scratch:
        corpus = Folder(scratch) / "corpus"
        manifest = generate_corpus(corpus, rows, SEQ_LEN, VOCAB_SIZE)
        config = {
            "steps": steps,
            "workers": 2,
            "threads": 1,
            "global_batch_size": 64,
            "micro_batch_size": 32,
            "evaluations": 1,
            "examples": [],
        }
        shape = {"hidden_size": 64, "num_layers": 1, "num_heads": 1, "max_seq_len": SEQ_LEN}
        job = PretrainSpec(
            build(PretrainConfig, config, "memory"),
            build(ModelConfig, shape, "memory"),
            corpus,
            manifest,
            "generated words",
        )
        meter = Meter()
        with ray_session(RayConfig(object_store_gb=0.5), 2) as resources:
            meter.start()
            train_on_ray(job, Folder(scratch) / "run", resources)
            meter.stop.set()
            meter.join()
    return {"rows": rows, "peak_mib": round(meter.peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--of", type=int, help="measure only one corpus, of this many rows")
    parser.add_argument("--json", action="store_true", help="kept for symmetry: JSON is printed")
    arguments = parser.parse_args()
    if arguments.of:
        print(json.dumps(measure(arguments.of, arguments.steps)))
        return
    found = []
    for rows in (arguments.rows, 100 * arguments.rows):
        command = [sys.executable, str(Path(__file__)), "--of", str(rows)]
        command += ["--steps", str(arguments.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{rows:,} rows: peak {found[-1]['peak_mib']:,} MiB", file=sys.stderr, flush=True)
    ratio = round(found[1]["peak_mib"] / found[0]["peak_mib"], 3)
    print(json.dumps({"measured": found, "steps": arguments.steps, "memory_ratio": ratio}))


if __name__ == "__main__":
    main()
