"""Bulk prediction: results in order and complete, and a whole file or none."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import reviews, write_csv

from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError, StorageError, UserError
from raybert.inference.bulk import PredictionWriter, evaluate, predict_source
from raybert.inference.classifier import TextClassifier
from raybert.storage.folder import Folder
from raybert.tasks.categorical import softmax
from raybert.tasks.single_label import SingleLabel

TASK = SingleLabel(["neg", "pos"])
GIVEN = ["row", "text"]


def record(row, text, neg):
    scores = {"neg": neg, "pos": 1 - neg}
    label = max(scores, key=scores.get)
    return {"row": row, "text": text, "label": label, "score": scores[label], "scores": scores}


RECORDS = [record(0, "good", 0.25), record(2, "ü", 0.5)]


def test_softmax_of_large_logits_does_not_overflow():
    probabilities = softmax(np.array([[1000.0, 1000.0], [0.0, -1000.0]], np.float32))
    assert probabilities.tolist() == [[0.5, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_file_appears_when_it_is_complete(tmp_path, name):
    path = tmp_path / "deep" / name
    with PredictionWriter(str(path), GIVEN, TASK) as writer:
        writer.write(RECORDS)
        writer.write([record(3, "more", 0.25)])
        assert not path.exists()
    assert os.listdir(path.parent) == [name]
    if name.endswith("jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pq.read_table(path).to_pylist()
    assert [row["row"] for row in rows] == [0, 2, 3]
    assert [row["text"] for row in rows] == ["good", "ü", "more"]
    assert [row["label"] for row in rows] == ["pos", "neg", "pos"]
    assert rows[0]["scores"] == {"neg": 0.25, "pos": 0.75}
    assert rows[0]["score"] == 0.75


def test_jsonl_on_an_object_store_appears_when_it_is_complete(bucket):
    with PredictionWriter((bucket / "out" / "a.jsonl").uri, GIVEN, TASK) as writer:
        writer.write(RECORDS)
        assert (bucket / "out").names() == []
    lines = (bucket / "out").read_text("a.jsonl").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["good", "ü"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_after_an_error_the_old_file_is_unchanged_and_no_other_remains(tmp_path, name):
    (tmp_path / name).write_text("old")
    with (
        pytest.raises(ZeroDivisionError),
        PredictionWriter(f"{tmp_path}/{name}", GIVEN, TASK) as writer,
    ):
        writer.write(RECORDS[:1])
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "old"


def test_a_full_disk_raises_a_storage_error_that_names_the_file(tmp_path):
    with (
        pytest.raises(StorageError, match=r"^writing .*a.jsonl failed: No space left on device"),
        open("/dev/full", "wb", buffering=0) as full,
        PredictionWriter(f"{tmp_path}/a.jsonl", GIVEN, TASK) as writer,
    ):
        writer._stream = full
        writer.write(RECORDS[:1])
    assert os.listdir(tmp_path) == []


def test_a_file_name_with_another_ending_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"--output .*a.txt: name a .jsonl or a .parquet file"):
        PredictionWriter(str(tmp_path / "a.txt"), GIVEN, TASK)


def test_a_folder_that_can_not_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't be written"):
        PredictionWriter(str(tmp_path / "file" / "a.jsonl"), GIVEN, TASK)


@pytest.mark.ray
def test_scores_are_in_order_and_equal_those_of_one_process(ray_session, model, tmp_path):
    rows = reviews(1300, seed=4)  # three batches of an actor
    source = SourceConfig(path=write_csv(Folder(tmp_path), "t.csv", rows))
    expected = TextClassifier(model).logits([text for text, _ in rows])
    done = []
    output = tmp_path / "out.parquet"
    result = predict_source(source, model, str(output), workers=2, on_progress=done.append)
    assert result["texts"] == 1300 == done[-1]
    written = pq.read_table(output)
    assert written["text"].to_pylist() == [text for text, _ in rows]
    scores = np.array([[one["neg"], one["pos"]] for one in written["scores"].to_pylist()])
    calibrated = TextClassifier(model).probabilities([text for text, _ in rows])
    np.testing.assert_allclose(scores, calibrated, atol=1e-2)  # two roundings of bf16

    metrics = evaluate(source, model, workers=2, on_progress=lambda n: None)
    truth = np.array([label == "pos" for _, label in rows])
    assert metrics["n"] == 1300
    assert metrics["accuracy"] == pytest.approx(((expected.argmax(1) == 1) == truth).mean())


@pytest.mark.ray
@pytest.mark.slow
def test_a_bad_row_raises_and_leaves_no_file(ray_session, model, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"text,label\n" + b"a superb film,pos\n" * 20 + b"f\xfflm,pos\n")
    output = tmp_path / "out" / "labels.jsonl"
    with pytest.raises(DataError, match="t.csv.*not UTF-8"):
        predict_source(
            SourceConfig(path=str(path)),
            model,
            str(output),
            workers=1,
            on_progress=lambda n: None,
        )
    assert os.listdir(output.parent) == []
