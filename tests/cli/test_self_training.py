"""Few labels: what a fine-tuned model gains from n-grams and from texts without labels."""

import json
import shutil

import pytest
import torch
from commands import Experiment, refused
from making import reviews, write_csv

from raybert.pipeline.ngrams_stage import DECISION
from raybert.pipeline.self_training_stage import CHOSEN
from raybert.storage.folder import Folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    from raybert.config import load
    from raybert.experiment import Experiment as Configured
    from raybert.pipeline import stages
    from raybert.terminal.display import Display

    torch.set_num_threads(1)
    experiment = Experiment(tmp_path_factory.mktemp("pretrained"), epochs=2, ngrams="on")
    stages.pretrain(load(Configured, experiment.config), Display(quiet=True), in_process=True)
    return experiment


@pytest.fixture
def options(pretrained, tmp_path):
    """Options of `finetune` for a copy of the experiment, and its folder."""
    shutil.copytree(pretrained.run, tmp_path / "tiny")
    texts = [(text, "") for text, _ in reviews(120, seed=5)]
    more = write_csv(Folder(tmp_path), "more.csv", texts)
    changes = (
        f"run.storage={tmp_path}",
        f"finetune.unlabelled.path={more}",
        "finetune.source.limit=60",
        "finetune.rounds=1",
    )
    given = [part for change in changes for part in ("--set", change)]
    return ("-c", pretrained.config, "--bare", "--json", *given), tmp_path / "tiny"


def test_a_killed_decision_on_n_grams_is_made_when_the_command_is_run_again(
    raybert, pretrained, tmp_path
):
    shutil.copytree(pretrained.run, tmp_path / "tiny")
    at = ("-c", pretrained.config, "--bare", "--json", "--set", f"run.storage={tmp_path}")
    done = raybert("finetune", *at)
    assert done.code == 0, done.err
    run = tmp_path / "tiny" / "finetune"
    made = (run / "model" / "ngrams.safetensors").read_bytes()
    for name in ("model/ngrams.json", "model/ngrams.safetensors", DECISION):
        (run / name).unlink()
    (run / "metrics.json").write_text("{}")  # of the encoder alone
    again = raybert("finetune", *at)
    assert again.code == 0, again.err
    assert "is finished already" in again.err
    assert (run / "model" / "ngrams.safetensors").read_bytes() == made
    assert not (run / "metrics.json").exists()
    assert "n-grams" not in raybert("finetune", *at).err


def test_students_learn_from_texts_without_labels(raybert, options):
    at, folder = options
    done = raybert("finetune", *at)
    assert done.code == 0, done.err
    chosen = json.loads((folder / "finetune" / CHOSEN).read_text())
    assert chosen["metric"] == "loss" and len(chosen["values"]) == 2
    assert chosen["round"] == chosen["values"].index(min(chosen["values"]))
    prepared = json.loads((folder / "self_training/1/data/data.json").read_text())
    assert prepared["train"]["rows"] > 100  # with those that have no label
    kept = (folder / "finetune/model/model.safetensors").read_bytes()
    best = folder / "self_training" / str(chosen["round"]) / "model/model.safetensors"
    assert best.read_bytes() == kept
    again = raybert("finetune", *at)  # which trains nothing more
    assert again.code == 0, again.err
    assert "unlabelled validation" not in again.err
    (folder / "finetune" / CHOSEN).unlink()  # killed before it
    again = raybert("finetune", *at)
    assert again.code == 0, again.err
    assert json.loads((folder / "finetune" / CHOSEN).read_text()) == chosen
    assert (folder / "finetune/model/model.safetensors").read_bytes() == kept
    answered = raybert("predict", "-m", folder, "a superb film")
    assert json.loads(answered.out)["label"] == "pos"


def test_unlabelled_texts_have_one_teacher(raybert, options):
    at, folder = options
    done = raybert("finetune", *at, "--distill-from", folder)
    assert "leave finetune.distill.teacher out" in refused(done)
    gone = raybert("finetune", *at, "--set", "finetune.unlabelled.path=/none.csv")
    assert refused(gone) == "/none.csv: no such file or folder"
