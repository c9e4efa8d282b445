"""`raybert finetune --seeds`: ensembles are measured, can teach, and train failed members again."""

import json

import numpy as np
import pytest
import safetensors.torch
from made import TASKS, measured_run
from making import searchable

from raybert.config import build
from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DamagedError
from raybert.experiment import Experiment
from raybert.inference.classifier import TextClassifier
from raybert.inference.ensemble import members as members_of
from raybert.model import huggingface
from raybert.pipeline import stages
from raybert.pipeline.ensemble_stage import finetune_seeds, measure
from raybert.pipeline.finetune_setup import teachers
from raybert.storage.folder import Folder
from raybert.tasks.prepared_texts import read_prepared_texts
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.terminal.display import Display
from raybert.tune.trial_store import TrialStore

QUIET = Display(quiet=True)


@pytest.mark.parametrize("name", TASKS)
def test_an_ensemble_of_equal_models_gains_nothing(tmp_path, name):
    folder = Folder(tmp_path)
    run = measured_run(folder, name)
    prepared = read_prepared_texts(folder / "data")
    how = Preprocessing(prepared.seq_len, prepared.head_tokens)
    texts = TokenizedTexts.load(folder / "data", prepared.validation)
    texts = texts.shortened(how, Tokenizer.load(folder / "tokenizer"))
    result = measure([run / "model"] * 2, texts)
    metric = result["metric"]
    assert metric == run.read_json("metrics.json")["metric"]
    assert result["ensemble"][metric] == pytest.approx(result["mean"], abs=1e-3, rel=1e-3)
    assert (result["agreement"], result["std"]) == (1.0, 0.0)
    other = [m for m in prepared.make_task().selection_metrics if m != metric][0]
    assert measure([run / "model"] * 2, texts, other)["metric"] == other


def test_an_ensemble_averages_the_calibrated_probabilities_of_its_members(tmp_path):
    """Each member has a temperature of its own; the second's answers are half as sure."""
    folder = Folder(tmp_path)
    run = measured_run(folder, "single_label")
    models = [run / "model", folder / "flat"]
    models[0].copy_to(models[1], last="config.json")
    tensors = safetensors.torch.load(models[0].read_bytes("model.safetensors"))
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name] * 3
    models[1].write_bytes("model.safetensors", safetensors.torch.save(tensors))
    prepared = read_prepared_texts(folder / "data")
    how = Preprocessing(prepared.seq_len, prepared.head_tokens)
    texts = TokenizedTexts.load(folder / "data", prepared.validation)
    texts = texts.shortened(how, Tokenizer.load(folder / "tokenizer"))
    members = [TextClassifier(model) for model in models]
    shares = [one.task.scores(one.score(texts.input_ids)) for one in members]
    mean = np.mean(shares, axis=0)[np.arange(len(texts.labels)), texts.labels]
    found = measure(models, texts)["ensemble"]["loss"]
    assert found == pytest.approx(-np.log(mean).mean(), abs=1e-4)


@pytest.mark.parametrize("content", ["[]", "{}", '{"models": 1}', '{"models": ["../x"]}', "{"])
def test_a_damaged_ensemble_is_named(tmp_path, content):
    (tmp_path / "ensemble.json").write_text(content)
    with pytest.raises(DamagedError, match="ensemble.json is damaged"):
        members_of(Folder(tmp_path))


@pytest.mark.ray
@pytest.mark.slow
def test_an_ensemble_is_measured_and_can_be_a_teacher(ray_session, tmp_path):
    experiment = searchable(tmp_path)
    result = finetune_seeds(experiment, QUIET, 3)
    assert len(result["members"]) == 3
    accuracies = [member["accuracy"] for member in result["members"]]
    assert result["gain"] == pytest.approx(
        result["ensemble"]["accuracy"] - sum(accuracies) / 3, abs=1e-9
    )
    assert finetune_seeds(experiment, QUIET, 3) == result
    weights = [
        huggingface.weights_hash(experiment.folder / "ensemble" / "members" / f"s{n}" / "model")
        for n in range(3)
    ]
    assert len(set(weights)) == 3

    values = json.loads(experiment.model_dump_json())
    values["run"]["name"] = "student"
    values["finetune"]["distill"]["teacher"] = str(experiment.folder)
    values["model"]["hidden_size"] = 8
    student = build(Experiment, values, "test")
    assert len(teachers(student)) == 3
    for name in experiment.folder.names("corpus"):
        data = (experiment.folder / "corpus").read_bytes(name)
        (student.folder / "corpus").write_bytes(name, data)
    stages.finetune(student, QUIET, in_process=True)
    data = student.folder / "finetune" / "data"
    prepared = read_prepared_texts(data)
    teacher = TokenizedTexts.load(data, prepared.train).teacher
    assert teacher.shape == (prepared.train.rows, 2)
    assert teacher.std() > 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_member_is_trained_when_the_command_is_run_again(ray_session, tmp_path):
    experiment = searchable(tmp_path)
    result = finetune_seeds(experiment, QUIET, 2)
    stage = experiment.folder / "ensemble"
    stage.delete("result.json")
    members = TrialStore(stage / "members")
    kept, lost = (members.folder_of(name) for name in ("s0", "s1"))
    for name in ("result.json", "metrics.jsonl", "model"):
        lost.delete(name)
    lost.write_json("outcome.json", {"state": "failed", "why": "its worker was lost", "ended": 1.0})
    attempts = len(kept.names("attempts"))
    again = finetune_seeds(experiment, QUIET, 2)
    for key in ("members", "mean", "ensemble"):
        assert again[key] == result[key]
    assert [e.state for e in members.read_all()] == ["finished", "finished"]
    assert len(kept.names("attempts")) == attempts  # it was not trained again
