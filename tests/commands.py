"""The command line in tests: an experiment, and commands in this process or a new one."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from making import MODEL, make_corpus, reviews, write_csv

from raybert.cli import commands
from raybert.config import build
from raybert.data.corpus.settings import CorpusConfig
from raybert.storage.folder import Folder

SCRIPT = Path(sys.executable).with_name("raybert")


class Result:
    """Exit code and output of a command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out.splitlines()[-1])


def run_here(arguments, stdin, capsys, monkeypatch):
    """Run a command in this process."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["raybert", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    capsys.readouterr()
    try:
        commands.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return Result(code, *capsys.readouterr())


def start(*arguments, cwd=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=cwd,
    )


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)


def refused(result):
    """Return the one line of a user error, the last one after any progress."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("raybert: ")]
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert len(errors) == 1 and lines[-1] == errors[0], result.err
    return errors[0].removeprefix("raybert: ")


class Experiment:
    """An experiment's configuration in a folder, and a corpus that was built without Ray.

    Texts and runs are in the same folder, or in `folder`.
    """

    def __init__(self, path, corpus=True, folder=None, **finetune):
        self.path = path
        folder = folder or Folder(path)
        self.texts = write_csv(folder, "labelled.csv", reviews(160))
        self.config = path / "tiny.yaml"
        self.values = {
            "run": {"name": "tiny", "storage": (folder / "runs").uri},
            "corpus": {
                "source": {"path": self.texts},
                "tokenizer": {"kind": "words", "vocab_size": 512, "min_frequency": 1},
                "seq_len": 16,
                "heldout_fraction": 0.1,
                "rows_per_part": 16,
                "rows_per_group": 4,
            },
            "model": MODEL,
            "pretrain": {
                "steps": 4,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "evaluations": 1,
                "evaluation_rows": 8,
                "threads": 1,
                "precision": "fp32",
                "checkpoint_steps": 1,
                "checkpoint_minutes": None,
                "log_every": 1,
                "examples": ["the film was [MASK]"],
            },
            "finetune": {
                "source": {"path": self.texts},
                "seq_len": 32,
                "global_batch_size": 16,
                "micro_batch_size": 8,
                "epochs": 8,
                "lr": 1e-2,
                "threads": 1,
                "precision": "fp32",
                **finetune,
            },
            "evaluate": {"source": {"path": write_csv(folder, "test.csv", reviews(80, seed=1))}},
        }
        self.config.write_text(json.dumps(self.values))  # JSON is YAML
        self.folder = folder / "runs" / "tiny"
        if corpus:
            config = build(CorpusConfig, self.values["corpus"], "test")
            make_corpus(self.folder / "corpus", texts=[t for t, _ in reviews(160)], config=config)

    @property
    def run(self):
        return self.path / "runs" / "tiny"
