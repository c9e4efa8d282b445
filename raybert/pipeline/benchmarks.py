"""Measure the training loop on generated words, and a classifier's precisions on labelled texts.

Training runs in this process or under Ray. The result is the loop's tokens per second without the
first steps, in which libraries select their kernels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raybert.cluster.scratch import scratch_folder
from raybert.cluster.session import ray_session
from raybert.data.corpus.manifest import FORMAT_VERSION, MANIFEST, Manifest
from raybert.data.corpus.parts import PartWriter
from raybert.data.encoding import id_dtype
from raybert.data.preprocess import Preprocessing
from raybert.data.sources.columns import with_columns_of
from raybert.data.tokenizer import Tokenizer
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.pipeline.named_sources import require_source, with_sources
from raybert.records import Record
from raybert.storage.folder import Folder
from raybert.tasks.labelled import read_labelled
from raybert.tasks.masked_lm import PretrainSpec
from raybert.tasks.prepared_texts import tokenize_labelled
from raybert.tasks.registry import read_columns, read_task
from raybert.terminal.display import Display
from raybert.train.ray.driver import train_on_ray
from raybert.train.run import train_in_process

WARMUP_STEPS = 10
_ROWS = 8192


def bench_train(experiment: Experiment, *, in_process: bool, display: Display) -> dict[str, Any]:
    """Run the configured pretraining on generated words; time the steps after the warm-up."""
    changed = {"log_every": 1, "evaluations": 1, "evaluation_rows": 2, "examples": []}
    config = experiment.pretrain.model_copy(update={**changed, "checkpoint_minutes": None})
    seconds: list[float] = []

    def on_progress(record: Record) -> None:
        display.record(record)
        if record["kind"] == "train" and record["step"] > WARMUP_STEPS:
            seconds.append(record["step_seconds"])

    with (
        scratch_folder("rbb-", Path(tempfile.gettempdir())) as scratch,
        display.stage("bench"),
    ):
        folder, run = Folder(scratch) / "corpus", Folder(scratch) / "run"
        corpus = experiment.corpus
        manifest = generate_corpus(folder, _ROWS, corpus.seq_len, corpus.tokenizer.vocab_size)
        spec = PretrainSpec(config, experiment.model, folder, manifest, "generated words")
        if in_process:
            result = train_in_process(spec, run, on_progress=on_progress)
        else:
            with ray_session(experiment.ray, config.max_workers) as resources:
                result = train_on_ray(spec, run, resources, on_progress=on_progress)
    if not seconds:
        raise ConfigError(
            f"pretrain.steps={result['step']}: the first {WARMUP_STEPS} are not timed; raise it"
        )
    tokens = config.global_batch_size * manifest.seq_len
    return {
        "tokens_per_second": round(tokens * len(seconds) / max(1e-9, sum(seconds)), 1),
        "steps": len(seconds),
        "bare": in_process,
        "machine": result["machine"],
    }


def bench_serve(
    experiment: Experiment, model: Folder, most: int, display: Display
) -> dict[str, Any]:
    """Measure a classifier in every precision on the experiment's evaluation source."""
    from raybert.inference.precision_choice import compare
    from raybert.model import huggingface

    task, has_pairs = read_task(model)
    # The model's own preprocessing handles HTML.
    experiment = with_sources(experiment)
    require_source(experiment.evaluate.source, "evaluate.source")
    given = experiment.evaluate.source.model_copy(update={"html_breaks": "keep"})
    source = with_columns_of(given, read_columns(model))
    found = read_labelled(source, type(task), task.labels)
    rows = np.random.default_rng(0).permutation(len(found.texts))[:most]
    found = found.take(np.sort(rows))  # a sample, because sources are often sorted by label
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with display.stage("bench"):
        texts = found.texts.to_pylist()
        if has_pairs and found.pairs is not None:
            texts = list(zip(texts, found.pairs.to_pylist(), strict=True))
        tokenizer = Tokenizer.load(model)
        how = Preprocessing.read(huggingface.read_preprocessing(model), 1 << 20)
        targets = tokenize_labelled(found, task, tokenizer, how).labels
        return compare(model, texts, targets, device, on_progress=display.progress)


def generate_corpus(folder: Folder, rows: int, seq_len: int, vocab_size: int) -> Manifest:
    """Write a corpus of random words whose frequencies follow Zipf's law, as in text."""
    words = " ".join(f"w{i}" for i in range(vocab_size))
    tokenizer = make_tokenizer(
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
