"""What a run has read is part of its identity: changed inputs under it are refused."""

import json
import os
import shutil
import time

import pytest
import torch
from commands import Experiment, refused
from making import reviews, write_csv

from raybert.config import load
from raybert.experiment import Experiment as Configured
from raybert.pipeline import stages
from raybert.storage.folder import Folder
from raybert.terminal.display import Display


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An experiment that is pretrained and fine-tuned, with a validation file."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("made")
    validation = write_csv(Folder(base), "validation.csv", reviews(20, seed=5))
    experiment = Experiment(base, validation={"path": validation}, steps=2, epochs=None)
    configured = load(Configured, experiment.config)
    stages.pretrain(configured, Display(quiet=True), in_process=True)
    stages.finetune(configured, Display(quiet=True), in_process=True)
    return experiment


@pytest.fixture(params=["finished", "begun"])
def experiment(request, made, tmp_path):
    """A copy of it, whose runs are finished or have begun."""
    shutil.copytree(made.path, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        if path.suffix in (".yaml", ".json"):
            text = path.read_text()
            path.write_text(text.replace(str(made.path), str(tmp_path / "copy")))
    copy = Experiment.__new__(Experiment)
    copy.path, copy.config = tmp_path / "copy", tmp_path / "copy" / "tiny.yaml"
    for name in ("labelled.csv", "validation.csv"):  # their times are not copied
        stat = (made.path / name).stat()
        os.utime(copy.path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if request.param == "begun":
        for stage in ("pretrain", "finetune"):
            (copy.run / stage / "result.json").unlink()
    return copy


@pytest.mark.parametrize("name", ["labelled.csv", "validation.csv"])
def test_changed_texts_are_refused(raybert, experiment, name):
    path = experiment.path / name
    path.write_text(path.read_text().replace("film", "movie"))
    message = refused(raybert("finetune", "-c", experiment.config, "--bare"))
    assert f"was prepared from {path} of " in message
    assert message.endswith("restore it, or choose another run.name")


def test_a_file_of_the_same_size_is_compared_by_its_content(raybert, experiment):
    path, at = experiment.path / "labelled.csv", ("finetune", "-c", experiment.config, "--bare")
    os.utime(path, (time.time(), time.time()))
    done = raybert(*at)
    assert done.code == 0, done.err
    path.write_text(path.read_text().replace(",pos", ",neg", 1))
    assert f"was prepared from {path}" in refused(raybert(*at))


def test_texts_that_were_deleted_do_not_stand_in_the_way(raybert, experiment):
    (experiment.path / "labelled.csv").unlink()
    done = raybert("finetune", "-c", experiment.config, "--bare")
    assert done.code == 0, done.err


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": "x", "model": 1}', "[" * 100_000])
def test_a_damaged_result_is_one_line(raybert, experiment, content):
    path = experiment.run / "finetune" / "result.json"
    path.write_text(content)
    message = refused(raybert("finetune", "-c", experiment.config, "--bare"))
    assert message.startswith(f"{path} is damaged: ")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_changed_tokenizer_model_or_corpus_is_refused(raybert, experiment, stage):
    if stage == "pretrain":
        path, what = experiment.run / "corpus" / "manifest.json", "corpus"
        manifest = json.loads(path.read_text())
        manifest["info"]["unigram_loss"] += 1  # as of other text
        path.write_text(json.dumps(manifest))
    else:
        path = experiment.run / "pretrain" / "model" / "model.safetensors"
        what = "model to start from"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    message = refused(raybert(stage, "-c", experiment.config, "--bare"))
    assert f"was started with another {what}; restore it, or choose another run.name" in message


def test_a_changed_teacher_is_refused(raybert, experiment):
    shutil.copytree(experiment.run / "finetune" / "model", experiment.path / "teacher")
    at = ("finetune", "-c", experiment.config, "--bare", "-n", "student",
          "--set", f"run.storage={experiment.path}/runs",
          "--set", f"finetune.initialize_from={experiment.run}/pretrain/model",
          "--distill-from", experiment.path / "teacher")  # fmt: skip
    assert raybert(*at).code == 0
    assert raybert(*at).code == 0
    weights = experiment.path / "teacher" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "was prepared with another teacher than finetune.distill." in refused(raybert(*at))
    shutil.rmtree(experiment.path / "teacher")  # then nothing can be compared
    done = raybert(*at)
    assert done.code == 0 and "is finished already" in done.err
