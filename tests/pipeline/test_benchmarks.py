"""The benchmark: what it measures on, and the figure that it prints."""

import json
import sys

import numpy as np
import pytest
from making import MODEL

from raybert.cli import commands
from raybert.config import build
from raybert.data.corpus.manifest import Manifest
from raybert.data.corpus.parts import PartReader
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.pipeline.benchmarks import WARMUP_STEPS, bench_train, generate_corpus
from raybert.storage.folder import Folder
from raybert.terminal.display import Display

TINY = {
    "corpus": {"seq_len": 8, "tokenizer": {"vocab_size": 64}},
    "model": MODEL,
    "pretrain": {
        "steps": WARMUP_STEPS + 3,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "threads": 1,
        "precision": "fp32",
    },
}


def test_generated_rows_are_ordinary_words_of_uneven_frequency(tmp_path):
    folder = Folder(tmp_path)
    manifest = generate_corpus(folder, rows=300, seq_len=16, vocab_size=200)
    assert Manifest.read(folder) == manifest
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.hash == manifest.tokenizer_hash
    reader = PartReader(folder, manifest, "train")
    reader.check()
    ids = reader.read_rows(np.arange(300)).input_ids
    assert (ids[:, 0] == tokenizer.cls_id).all()
    assert (ids[:, -1] == tokenizer.sep_id).all()
    counts = np.bincount(ids[:, 1:-1].ravel(), minlength=tokenizer.vocab_size)
    assert counts[tokenizer.is_special].sum() == 0
    assert counts.max() > 20 * np.median(counts[~tokenizer.is_special])


def test_a_bare_measurement_times_the_steps_after_the_warm_ones():
    result = bench_train(build(Experiment, TINY, "x"), in_process=True, display=Display(quiet=True))
    assert result["steps"] == 3
    assert result["tokens_per_second"] > 0
    assert result["bare"] is True
    json.dumps(result)


def test_a_measurement_without_a_timed_step_is_refused():
    values = TINY | {"pretrain": TINY["pretrain"] | {"steps": WARMUP_STEPS}}
    with pytest.raises(ConfigError, match=r"^pretrain\.steps=10: the first 10 are not timed"):
        bench_train(build(Experiment, values, "x"), in_process=True, display=Display(quiet=True))


def test_the_command_prints_one_json_object_last(tmp_path, capsys, monkeypatch):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY))
    monkeypatch.setattr(
        sys, "argv", ["raybert", "bench", "train", "-c", str(path), "--bare", "--json"]
    )
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert not end.value.code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_per_second"] > 0
