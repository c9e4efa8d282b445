"""Models and runs for others: `raybert export` and `raybert compare`."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from commands import refused
from made import TASKS, measured_run, texts_of
from making import finetune_job, reviews

from raybert.inference import scored_texts
from raybert.inference.classifier import TextClassifier
from raybert.storage.folder import Folder
from raybert.tasks.comparison import Predictions
from raybert.tasks.labelled import read_labelled
from raybert.tasks.registry import read_task
from raybert.train.run import train_in_process

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="the extra onnx is not installed",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = {}

    def get(name):
        if name not in found:
            found[name] = measured_run(Folder(tmp_path_factory.mktemp(name)), name)
        return found[name]

    return get


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_model_of_each_task_is_exported(raybert, runs, tmp_path, name):
    import onnxruntime

    run = runs(name)
    shutil.copytree(f"{run.path}/../data", f"{run.path}/data", dirs_exist_ok=True)
    done = raybert("export", run.path, "--int8", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["texts_from"] == "validation" and found["texts"] > 5
    assert found["onnx"]["fp32"]["max_difference"] < 1e-3
    metric = found["metric"]
    assert found["onnx"]["fp32"][metric] == pytest.approx(found["pytorch"][metric], abs=1e-4)
    assert found["onnx"]["int8"]["points_lost"] is not None
    # Other sizes than those that were traced, with padding, and the tokenizer beside the graph.
    classifier = TextClassifier(run / "model", precision="fp32")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    texts = [texts_of(row) for row in TASKS[name](5, seed=2).rows]
    rows = classifier.encode([tuple(t) if len(t) > 1 else t[0] for t in texts])
    longest = max(map(len, rows))
    ids, mask = np.zeros((5, longest), np.int64), np.zeros((5, longest), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    [logits] = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
    for row, got, expected in zip(rows, logits, classifier.score(rows), strict=True):
        got = got[: len(row)] if classifier.task.is_per_token else got
        np.testing.assert_allclose(got, expected, atol=1e-3)
    assert (tmp_path / "out" / "tokenizer.json").exists()


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"layout": "classic"},
        {"num_layers": 2, "global_attention_every": 2, "local_attention": 8},
    ],
)
def test_layouts_and_local_attention_are_exported(raybert, tmp_path, model):
    job = finetune_job(Folder(tmp_path), rows=reviews(60), model=model, steps=2)
    train_in_process(job, Folder(tmp_path) / "run", on_progress=lambda record: None)
    done = raybert("export", tmp_path / "run", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["onnx"]["fp32"]["max_difference"] < 1e-3


@needs_onnx
@pytest.mark.slow
def test_a_graph_that_differs_is_an_error(raybert, runs, tmp_path, monkeypatch):
    from raybert.pipeline import export_stage

    monkeypatch.setattr(export_stage, "MAX_DIFFERENCE", 0.0)
    done = raybert("export", runs("single_label").path, "-o", tmp_path / "out")
    assert done.code == 1 and "its logits differ from PyTorch's by up to" in done.err


def test_what_can_not_be_exported_is_one_line(raybert, runs, tmp_path, monkeypatch):
    assert "no model here" in refused(raybert("export", tmp_path, "-o", tmp_path / "out"))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    told = refused(raybert("export", runs("single_label").path, "-o", tmp_path / "out"))
    assert told == (
        "--format onnx needs onnxscript, which is not installed; pip install 'raybert[onnx]'"
    )


def scored(folder, run, rows="rows.jsonl"):
    """Store a run's outputs on its own training rows, as `raybert evaluate` does."""
    from raybert.data.sources.settings import SourceConfig

    task, _ = read_task(run / "model")
    labelled = read_labelled(SourceConfig(path=(folder / rows).uri), type(task), task.labels)
    classifier = TextClassifier(run / "model", precision="fp32")
    outputs = classifier.logits(labelled.texts.to_pylist())
    found = Predictions(task, outputs, task.targets(labelled.labels.to_pylist()))
    scored_texts.save(run, labelled, found)
    return found


def test_runs_are_compared(raybert, runs, tmp_path):
    run = runs("single_label")
    folder = Folder(f"{run.path}/..")
    found = scored(folder, run)
    again = scored_texts.load(run)
    np.testing.assert_array_equal(again.predictions.outputs, found.outputs)
    np.testing.assert_array_equal(again.predictions.targets, found.targets)
    shutil.copytree(run.path, tmp_path / "better")
    better = Folder(tmp_path / "better")
    # A model that knows every label, on the same texts in another order, and fewer of them.
    labelled = read_labelled_of(folder)
    order = np.random.default_rng(0).permutation(len(found.targets))[:100]
    outputs = np.eye(len(found.task.labels), dtype=np.float32)[found.targets[order]] * 9
    scored_texts.save(
        better, labelled.take(order), Predictions(found.task, outputs, found.targets[order])
    )
    page = tmp_path / "compare.html"
    done = raybert("compare", run.path, better.path, "-o", page, "--json")
    assert done.code == 0, done.err
    [pair] = done.json["differences"]
    assert pair["texts"] == 100 and pair["difference"]["value"] > 0
    assert pair["difference"]["low"] <= pair["difference"]["value"] <= pair["difference"]["high"]
    assert "<svg" in page.read_text() and "better" in page.read_text()
    shown = raybert("compare", run.path, run.path)
    assert "not certainly different" in shown.out and "alidation" in shown.out


def read_labelled_of(folder):
    from raybert.data.sources.settings import SourceConfig
    from raybert.tasks.single_label import SingleLabel

    return read_labelled(SourceConfig(path=(folder / "rows.jsonl").uri), SingleLabel)


def test_runs_without_common_texts_have_no_interval(raybert, runs, tmp_path):
    run = runs("single_label")
    shutil.copytree(run.path, tmp_path / "other")
    (tmp_path / "other" / scored_texts.FILE).unlink(missing_ok=True)
    done = raybert("compare", run.path, tmp_path / "other")
    assert done.code == 0 and "no interval: other: no outputs of evaluated texts" in done.out
    assert "name two runs or more" in refused(raybert("compare", run.path))
    assert "no run here" in refused(raybert("compare", run.path, tmp_path / "none"))
    (tmp_path / "other" / scored_texts.FILE).write_bytes(b"PAR1")
    done = raybert("compare", run.path, tmp_path / "other", "--json")
    assert "damaged" in json.dumps(done.json["differences"])
