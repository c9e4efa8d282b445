"""Checkpoints that are kept, and runs that branch from them."""

import pytest
from commands import Experiment, refused
from making import same_tensors
from safetensors.torch import load_file

from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return Experiment(tmp_path_factory.mktemp("branch"))


def pretrain(raybert, experiment, name, *settings):
    """Pretrain an experiment of its own on the same corpus; returns the command's result."""
    corpus = experiment.folder / "corpus"
    own = Folder(experiment.path / "runs" / name)
    if not own.exists("corpus/manifest.json"):
        corpus.copy_to(own / "corpus", last="manifest.json")
    options = [part for setting in settings for part in ("--set", f"pretrain.{setting}")]
    keep = ("--set", "pretrain.keep_checkpoints=1", "--set", "pretrain.deterministic=true")
    return raybert("pretrain", "-c", experiment.config, "--name", name, "--bare", *keep, *options)


def pretrain_base(raybert, experiment):
    """The run that is branched from, which keeps step 2 beside its last one; it is made once."""
    done = pretrain(raybert, experiment, "base", "steps=6", "milestones=[2]")
    assert done.code == 0, done.err
    return experiment.path / "runs" / "base"


def weights(experiment, name):
    return load_file(experiment.path / "runs" / name / "pretrain" / "model" / "model.safetensors")


def test_a_branch_of_the_same_length_ends_with_the_weights_of_its_base(raybert, experiment):
    run = pretrain_base(raybert, experiment) / "pretrain"
    assert CheckpointStore(Folder(run), 99, 1).steps() == [2, 6]
    branch = pretrain(raybert, experiment, "same", "steps=6", f"branch_from={run}@2")
    assert branch.code == 0, branch.err
    assert same_tensors(weights(experiment, "base"), weights(experiment, "same"))
    short = pretrain(raybert, experiment, "short", "steps=4", f"branch_from={run.parent}@2")
    assert short.code == 0, short.err
    assert CheckpointStore(Folder(experiment.path / "runs/short/pretrain"), 99, 1).steps() == [4]
    assert not same_tensors(weights(experiment, "base"), weights(experiment, "short"))
    again = pretrain(raybert, experiment, "short", "steps=4", f"branch_from={run.parent}@2")
    assert again.code == 0 and "finished already" in again.err + again.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["branch_from={base}@3"], "has no checkpoint of step 3; it has 2, 6 (pretrain.milestones"),
        (["branch_from={base}"], "give a run and a step, as runs/base@5000"),
        (["branch_from={base}@last"], "give a run and a step"),
        (["branch_from={base}/nothing@2"], "has no run of pretraining"),
        (["branch_from={base}@2", "lr=0.5"], "has other settings (pretrain.lr: "),
    ],
)
def test_what_can_not_be_branched_from_is_refused(raybert, experiment, settings, message):
    base = pretrain_base(raybert, experiment)
    given = [setting.format(base=base) for setting in settings]
    done = pretrain(raybert, experiment, "refused", "steps=6", *given)
    assert message in refused(done)
    assert not Folder(experiment.path / "runs/refused/pretrain").exists("config.yaml")
