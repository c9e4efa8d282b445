"""A mean over no token and no row is null everywhere, and never the best."""

import json

import numpy as np
import pytest
import torch
from making import finetune_spec, make_corpus, pretrain_job, tokenizer_of

from raybert.pipeline.stages import warn_above_unigram
from raybert.records import finite, format_mean, headline, measures, selected
from raybert.storage.folder import Folder
from raybert.tasks.masked_lm import model_card
from raybert.tasks.multi_label import MultiLabel
from raybert.tasks.regression import Regression
from raybert.tasks.single_label import SingleLabel
from raybert.tasks.token_classification import TokenClassification
from raybert.terminal.display import Display
from raybert.train.metrics_log import read_metrics
from raybert.train.run import train_in_process

NOTHING = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "null"),
    [
        (MultiLabel(["a", "b"]), NOTHING, NOTHING, {"f1_micro", "f1_macro", "average_precision"}),
        (Regression(["a", "b"]), NOTHING, NOTHING * np.nan, {"rmse", "mae", "spearman", "r2"}),
        (Regression(["a", "b"]), NOTHING, NOTHING, {"spearman", "r2"}),
        (
            TokenClassification(["O", "B-X", "I-X"]),
            [np.zeros((4, 3), np.float32)],
            [np.full(4, -1)],
            {"f1", "f1_macro", "accuracy", "loss", "precision", "recall"},
        ),
        (
            TokenClassification(["O", "B-X", "I-X"]),
            [np.eye(3, dtype=np.float32)[[0, 0]]],
            [np.zeros(2, np.int64)],
            {"f1", "f1_macro"},
        ),
    ],
)  # fmt: skip
def test_metrics_of_nothing_are_null(task, outputs, targets, null):
    found = task.evaluate(outputs, targets)
    stored = json.loads(json.dumps(finite(found), allow_nan=False))
    assert null <= {name for name, value in stored.items() if value is None}
    named = {**found, "metric": sorted(null)[0]}
    for scores in (named, {**stored, "metric": named["metric"]}):  # in memory and in a file
        assert headline(scores) == f"{named['metric']} none"
        assert not np.isfinite(selected(scores)[1])
        assert not null & measures(scores).keys()
    assert task.tables(found) is not None and task.tables(stored) is not None


def test_a_label_without_rows_has_no_recall():
    scores = finite(SingleLabel(["a", "b", "c"]).evaluate(np.eye(3)[[0, 2]], np.array([0, 0])))
    assert scores["per_class"]["b"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert scores["per_class"]["c"]["precision"] == 0.0
    assert scores["per_class"]["c"]["recall"] is None
    [table] = SingleLabel(["a", "b", "c"]).tables(scores)
    assert table.rows[1] == ["b", "none", "none", "none", "0"]


def test_a_run_whose_held_out_text_is_not_masked_has_no_best_step(tmp_path, capsys):
    torch.set_num_threads(1)
    folder = Folder(tmp_path)
    make_corpus(folder / "corpus", texts=["a", *["the film was good"] * 9])  # the first is held out
    spec = pretrain_job(folder / "corpus", steps=2, evaluations=2)
    display = Display()
    with display.stage("pretrain"):
        result = train_in_process(spec, folder / "run", on_progress=display.record)
        warn_above_unigram(result, display)
    assert (result["loss"], result["best_step"], result["best_score"]) == (None, None, None)
    records = read_metrics(folder / "run")
    assert [(r["loss"], r["score"]) for r in records if r["kind"] == "eval"] == [(None, None)] * 2
    shown = capsys.readouterr().err
    assert "held-out loss none  (nothing held out was predicted)" in shown
    assert "warning   no held-out token was predicted" in shown
    assert "Held-out loss: not measured" in model_card(spec, result)
    assert (folder / "run" / "model").exists("config.json")


def test_validation_texts_without_entities_choose_no_weights(tmp_path):
    torch.set_num_threads(1)
    folder = Folder(tmp_path)
    rows = [{"tokens": ["in", "oslo"], "tags": ["O", "B-LOC"]}] * 8
    for name, some in (("rows", rows), ("none", [{"tokens": ["in", "the"], "tags": ["O", "O"]}])):
        folder.write_text(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in some))
    spec = finetune_spec(
        folder, (folder / "rows.jsonl").uri, tokenizer_of(["in oslo the"]),
        validation={"path": (folder / "none.jsonl").uri}, evaluations=2,
    )  # fmt: skip
    assert spec.prepared.warnings == [
        "no text to validate on has the label 'LOC': its scores can't be measured; set "
        "finetune.validation_split=stratified, or add texts"
    ]
    result = train_in_process(spec, folder / "run", on_progress=lambda record: None)
    assert (result["f1"], result["best_step"]) == (None, None)
    assert result["accuracy"] is not None


def test_a_mean_in_words():
    assert [format_mean(v) for v in (None, float("nan"), 0.5)] == ["none", "none", "0.5000"]
