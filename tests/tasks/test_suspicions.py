"""Labels and texts that look wrong are told before training, and matrices are bounded."""

import json
import resource

import numpy as np
import pytest
from making import finetune_spec, reviews, tokenizer_of, write_csv

from raybert.records import finite
from raybert.report.page import render
from raybert.report.stage_files import Stage
from raybert.storage.folder import Folder
from raybert.tasks.classification_metrics import (
    MAX_MATRIX,
    classification_scores,
    fit_temperature,
)

TOKENIZER = tokenizer_of([text for text, _ in reviews(200)])


def told(folder, rows, **settings):
    """What is told about labelled rows."""
    path = write_csv(Folder(folder), "rows.csv", rows)
    return finetune_spec(Folder(folder), path, TOKENIZER, **settings).prepared.warnings


def test_nothing_is_told_of_ordinary_labels(tmp_path):
    assert told(tmp_path, reviews(200)) == []
    stars = [(text, i % 5) for i, (text, _) in enumerate(reviews(200))]
    assert told(tmp_path, stars) == []


def test_an_id_as_label_is_told(tmp_path):
    ids = [(text, f"id-{i}") for i, (text, _) in enumerate(reviews(120))]
    first, *_ = told(tmp_path, ids)
    assert first.startswith("label_column=label has 120 different labels in 120 texts, as an id, a")
    assert first.endswith("set finetune.source.label_column to a column of classes")
    numbers = [(text, i) for i, (text, _) in enumerate(reviews(120))]
    assert told(tmp_path, numbers)[0].endswith("or finetune.task=regression")


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_number_as_label_is_told(tmp_path, scale):
    rows = [(text, f"{i % 30 * scale:g}") for i, (text, _) in enumerate(reviews(300))]
    [line, *_] = told(tmp_path, rows, task="single_label")
    assert line == (
        f"the 30 labels are numbers from 0 to {29 * scale:g}: if they are quantities, set "
        "finetune.task=regression"
    )


def test_a_class_without_training_or_validation_texts_is_told(tmp_path):
    validation = write_csv(Folder(tmp_path), "validation.csv", [("a film", "pos"), ("it", "new")])
    source = {"path": write_csv(Folder(tmp_path), "a.csv", reviews(40))}
    source["labels"] = ["neg", "pos", "new"]
    spec = finetune_spec(
        Folder(tmp_path), source["path"], TOKENIZER, source=source, validation={"path": validation}
    )
    first, second = spec.prepared.warnings
    assert first.startswith("no text to train on has the label 'new': it can't be learned;")
    assert second.startswith("no text to validate on has the label 'neg': its scores can't be")


def test_one_label_of_nearly_all_texts_is_told(tmp_path):
    rows = [(text, "rare" if i < 3 else "usual") for i, (text, _) in enumerate(reviews(200))]
    found = [line for line in told(tmp_path, rows) if "always answering" in line]
    assert len(found) == 1 and "finetune.class_weights=balanced and finetune.metric=" in found[0]


def test_two_spellings_of_a_label_are_told(tmp_path):
    rows = [(text, ("neg", "pos", "Pos ")[i % 3]) for i, (text, _) in enumerate(reviews(90))]
    assert told(tmp_path, rows)[0].startswith("the labels 'Pos', 'pos' differ only in case")


def test_a_label_that_programs_write_for_none_is_told(tmp_path):
    rows = [(text, ("neg", "pos", "NaN")[i % 3]) for i, (text, _) in enumerate(reviews(90))]
    assert told(tmp_path, rows)[0].startswith("the label 'NaN' is how programs write a missing")


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_texts_that_are_trained_and_validated_on_are_told(tmp_path, share):
    rows, others = reviews(40), reviews(40, seed=9)
    mixed = rows[: round(40 * share)] + others[: 40 - round(40 * share)]
    validation = {"path": write_csv(Folder(tmp_path), "validation.csv", mixed)}
    found = told(tmp_path, rows, validation=validation)
    assert len(found) == (share > 0)
    if share:
        assert found[0].startswith(
            f"{round(40 * share)} of 40 validation texts are also trained on"
        )


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            [{"text": f"a film {i}", "label": 1.5} for i in range(20)],
            "every text has the same number in 'label'",
        ),
        (
            [{"text": f"a film {i}", "label": [f"tag {i}"]} for i in range(60)],
            "label_column=label has 60 different labels in 60 texts, as an id",
        ),
        (
            [{"text": f"it {i}", "label": [["a", "b"][i % 2]]} for i in range(20)]
            + [{"text": "the film", "label": ["A"]}],
            "the labels 'A', 'a' differ only in case or spaces",
        ),
    ],
)
def test_other_tasks_tell_what_fits_them(tmp_path, rows, line):
    folder = Folder(tmp_path)
    folder.write_text("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    texts = tokenizer_of([row["text"] for row in rows])
    found = finetune_spec(folder, (folder / "rows.jsonl").uri, texts).prepared.warnings
    assert any(each.startswith(line) for each in found), found


def test_the_matrices_of_many_labels_are_bounded():
    """Of 25,000 labels a matrix of confusions would have 625 million cells."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count, rows = 25_000, 100
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, count)).astype(np.float32)
    labels = rng.integers(0, count, rows)
    labels[:3] = logits[:3].argmax(axis=1)
    logits[3:9] = 0
    logits[3:9, 7], labels[3:9] = 9, 11  # the most frequent confusion
    names = [f"label {i}" for i in range(count)]
    scores = classification_scores(logits, labels, names)
    fit_temperature(logits, labels)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_500_000  # KiB; the matrix alone would be 5 GB, and a list of it 20
    assert "confusion" not in scores and 1 < len(scores["confusions"]) <= MAX_MATRIX
    assert scores["confusions"][0] == [11, 7, 6]
    page = render("a run", [Stage("evaluate", scores=finite(scores))])
    assert "Most frequent confusions" in page


def test_chunks_change_no_score(monkeypatch):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((97, 7)).astype(np.float32), rng.integers(0, 7, 97)
    names = list("abcdefg")
    expected = classification_scores(logits, labels, names)
    monkeypatch.setattr("raybert.tasks.classification_metrics._MAX_CELLS", 70)
    assert finite(classification_scores(logits, labels, names)) == finite(expected)
    assert 0.25 <= fit_temperature(logits, labels) <= 10  # of ten rows
