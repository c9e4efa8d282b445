"""Measure the training loop on generated data: bare, and under Ray, alternating.

The figure is the loop's own tokens per second over the timed steps, after the first batch and after
the first steps, in which libraries choose their kernels.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from raybert.config import build, parse_yaml
from raybert.display import Display
from raybert.errors import ConfigError
from raybert.model.encoder import ModelConfig
from raybert.ray_session import RayConfig, ray_session
from raybert.storage import Folder
from raybert.text import vocabulary
from raybert.text.parts import FORMAT_VERSION, MANIFEST, Manifest, PartWriter, id_dtype
from raybert.text.tokenizer import TokenizerConfig
from raybert.train.pretrain import PretrainConfig, PretrainJob

WARM_STEPS = 10
_ROWS = 8192


class Shape(NamedTuple):
    """A model and its batches."""

    model: dict[str, Any]
    vocab_size: int
    seq_len: int
    batch: int
    masking: dict[str, Any]


SHAPES = {
    # The Keras example "End-to-end Masked Language Modeling with BERT".
    "keras": Shape(
        {
            "layout": "classic",
            "hidden_size": 128,
            "num_layers": 1,
            "num_heads": 8,
            "intermediate_size": 128,
        },
        30_000,
        256,
        32,
        {"mask_rate": 0.15},
    ),
    "small": Shape(
        {
            "layout": "classic",
            "hidden_size": 256,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 1024,
        },
        8_192,
        128,
        64,
        {"mask_rate": 0.15},
    ),
}


def run_bench(
    shape: str,
    mode: str,
    steps: int,
    workers: int,
    threads: int | None,
    overrides: Sequence[str],
    display: Display,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure a shape; `both` alternates bare and Ray and adds the ratio of the medians.

    Raises:
        ConfigError: an unknown shape or mode.
    """
    if shape not in SHAPES:
        raise ConfigError(f"--shape {shape}: choose one of {', '.join(SHAPES)}")
    if mode not in ("bare", "ray", "both"):
        raise ConfigError(f"--mode {mode}: choose bare, ray or both")
    modes = ["bare", "ray"] if mode == "both" else [mode]
    measured: dict[str, list[float]] = {name: [] for name in modes}
    with tempfile.TemporaryDirectory(prefix="raybert-bench-") as scratch:
        job = make_job(
            Folder(scratch) / "corpus", SHAPES[shape], steps, workers, threads, overrides
        )
        for repeat in range(repeats if mode == "both" else 1):
            for name in modes:
                run = Folder(scratch) / f"{name}-{repeat}"
                with display.stage(name):
                    measured[name].append(_measure(job, run, name, display))
    medians = {name: statistics.median(values) for name, values in measured.items()}
    result: dict[str, Any] = {
        "shape": shape,
        "steps": steps,
        "workers": workers,
        "threads": threads,
        "tokens_per_second": medians[modes[0]],
        "medians": medians,
        "measured": measured,
    }
    if mode == "both":
        result["ratio"] = round(medians["ray"] / medians["bare"], 4)
    return result


def make_job(
    folder: Folder,
    shape: Shape,
    steps: int,
    workers: int = 1,
    threads: int | None = None,
    overrides: Sequence[str] = (),
) -> PretrainJob:
    """Generate a corpus of random words and a pretraining job over it."""
    manifest = generate_corpus(folder, _ROWS, shape.seq_len, shape.vocab_size)
    values: dict[str, Any] = {
        "steps": WARM_STEPS + steps,
        "global_batch_size": shape.batch,
        "micro_batch_size": shape.batch // workers,
        "workers": workers,
        "threads": threads,
        "masking": shape.masking,
        "evaluations": 1,
        "evaluation_rows": 2,
        "log_every": 1,
        "checkpoint_minutes": None,
        "examples": [],
    }
    for override in overrides:
        key, _, text = override.partition("=")
        values[key] = parse_yaml(text, f"--set {key}")
    return PretrainJob(
        config=build(PretrainConfig, values, "raybert bench"),
        model=build(ModelConfig, shape.model, "raybert bench"),
        corpus=folder,
        manifest=manifest,
        source="generated words",
    )


def generate_corpus(folder: Folder, rows: int, seq_len: int, vocab_size: int) -> Manifest:
    """Write a corpus of random words whose frequencies fall as those of text do (Zipf's law)."""
    words = " ".join(f"w{i}" for i in range(vocab_size))
    tokenizer = vocabulary.make(
        TokenizerConfig(kind="words", vocab_size=vocab_size, min_frequency=1), [words]
    )
    tokenizer.save(folder)
    rng = np.random.default_rng(0)
    ordinary = np.flatnonzero(~tokenizer.is_special)
    splits = {}
    for split, count in (("train", rows), ("heldout", 64)):
        writer = PartWriter(
            folder,
            split,
            seq_len=seq_len,
            vocab_size=vocab_size,
            rows_per_part=2048,
            rows_per_group=32,
        )
        for begin in range(0, count, 1024):
            size = (min(1024, count - begin), seq_len)
            ids = ordinary[np.minimum(rng.zipf(1.2, size), len(ordinary)) - 1]
            ids[:, 0], ids[:, -1] = tokenizer.cls_id, tokenizer.sep_id
            writer.append(ids, np.ones(size, np.bool_))
        splits[split] = writer.close()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_len=seq_len,
        dtype=id_dtype(vocab_size).name,
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer.hash,
        splits=splits,
    )
    folder.write_json(MANIFEST, manifest.model_dump())
    return manifest


def _measure(job: PretrainJob, run: Folder, mode: str, display: Display) -> float:
    """Tokens per second over one run's timed steps."""
    seconds: list[float] = []

    def note(record: dict[str, Any]) -> None:
        display.record(record)
        if record["kind"] == "train" and record["step"] > WARM_STEPS:
            seconds.append(record["step_seconds"])

    if mode == "bare":
        from raybert.train.run import execute_bare

        execute_bare(job, run, on_progress=note)
    else:
        from raybert.train.worker import train_on_ray

        with ray_session(RayConfig(), job.config.workers) as resources:
            train_on_ray(job, run, resources, on_progress=note)
    tokens = job.config.global_batch_size * job.manifest.seq_len
    return round(tokens * len(seconds) / sum(seconds), 1)
