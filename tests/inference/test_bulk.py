"""Bulk prediction: results in order and complete, and a whole file or none."""

import json
import os
import resource
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import reviews

from raybert.data.sources.documents import read, shards
from raybert.data.sources.row_table import parse_label
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError, StorageError, UserError
from raybert.inference.bulk import evaluate, predict_source
from raybert.inference.classifier import TextClassifier
from raybert.inference.prediction_file import PredictionWriter, check_output
from raybert.pipeline.predict_stage import choose_columns
from raybert.records import finite
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a.parquet"])
def test_a_full_disk_raises_a_storage_error_that_names_the_file(tmp_path, name):
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with (
            pytest.raises(StorageError, match=rf"^writing .*{name} failed: File too large"),
            PredictionWriter(f"{tmp_path}/{name}", GIVEN, TASK) as writer,
        ):
            for number in range(300):
                writer.write([record(number, os.urandom(300).hex(), 0.5)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path):
    path, target = tmp_path / "a.csv", tmp_path / "other"
    target.write_text("untouched")
    path.symlink_to(target)
    with (
        PredictionWriter(str(path), GIVEN, TASK) as one,
        PredictionWriter(str(path), GIVEN, TASK) as other,
    ):
        one.write([record(n, "long " * 9, 0.25) for n in range(99)])
        other.write([record(n, "x", 0.25) for n in range(9)])
    assert len(path.read_text().splitlines()) == 100  # the one that is closed last
    assert target.read_text() == "untouched" and not path.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "other"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ANY = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT


@given(st.lists(st.tuples(TEXT, ANY, st.floats(0, 1)), min_size=1, max_size=20))
@settings(max_examples=12, deadline=None)
def test_every_format_reads_back_as_it_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "written"
    texts = [text.strip() for text, *_ in rows]
    for name in ("a.jsonl", "a.csv", "a.csv.gz", "a.jsonl.gz", "a.parquet"):
        with PredictionWriter(f"{folder}/{name}", GIVEN, TASK, {"id": pa.string()}) as writer:
            writer.write([record(n, t, p) | {"id": i} for n, (t, i, p) in enumerate(rows)])
        source = SourceConfig(
            path=f"{folder}/{name}", on_bad_row="skip", html_breaks="keep", keep_columns=["id"]
        )
        found = [
            row
            for shard in shards(source)
            for table in read(shard, source, labels=parse_label)
            for row in table.to_pylist()
        ]
        assert [row["text"] or "" for row in found] == texts
        good = [pair for pair in zip(found, rows, strict=True) if pair[0]["text"]]
        for row, (_, value, probability) in good:
            assert row["label"] == ("neg" if probability >= 0.5 else "pos")
            (kept,) = json.loads(row["kept"])
            if name.startswith("a.jsonl"):
                assert kept == finite(value)
            elif isinstance(value, str):
                assert kept == value


def test_file_names_are_checked_before_anything_is_read(tmp_path):
    for name in ("a.txt", "a", "a.parquet.gz", "a.gz"):
        with pytest.raises(
            UserError, match=r"--output .*: name a .jsonl, a .csv or a .parquet file"
        ):
            check_output(str(tmp_path / name))
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UserError, match=r"a.csv: is a folder; name a file in it"):
        check_output(str(tmp_path / "a.csv"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"can't be written: .*file is a file"):
        check_output(str(tmp_path / "file" / "deep" / "a.csv"))
    check_output(str(tmp_path / "new" / "folder" / "a.CSV"))


def test_ids_or_chosen_columns_are_kept(tmp_path):
    (tmp_path / "a.csv").write_text("reviewId,valid,text,label,Doc-ID,id\n1,2,a,b,3,4\n")
    source = SourceConfig(path=str(tmp_path / "a.csv"))
    assert choose_columns(source, ["ids"]) == ["reviewId", "Doc-ID", "id"]
    assert choose_columns(source, ["all"]) == ["reviewId", "valid", "label", "Doc-ID", "id"]
    assert choose_columns(source, ["label", "ids"]) == ["label", "reviewId", "Doc-ID", "id"]
    with pytest.raises(
        UserError, match=r"--keep autor: .*a.csv has no column of that name; there are"
    ):
        choose_columns(source, ["autor"])
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=1" / "b.jsonl").write_text('{"text": "a", "meta": {"id": 5}}\n')
    source = SourceConfig(path=str(tmp_path / "day=1"))
    assert choose_columns(source, ["meta.id", "day"]) == ["meta.id", "day"]
    (tmp_path / "c.txt").write_text("one\n")
    assert choose_columns(SourceConfig(path=str(tmp_path / "c.txt")), ["ids"]) == []


def test_a_folder_that_can_not_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't be written"):
        PredictionWriter(str(tmp_path / "file" / "a.jsonl"), GIVEN, TASK)


@pytest.mark.ray
def test_scores_are_in_order_and_equal_those_of_one_process(ray_session, model, tmp_path):
    rows = reviews(1300, seed=4)  # three batches of an actor
    numbers = pa.array(range(1300), pa.int32())
    columns = {"text": [t for t, _ in rows], "label": [y for _, y in rows], "id": numbers}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = SourceConfig(path=str(tmp_path / "t.parquet"), keep_columns=["id", "label"])
    expected = TextClassifier(model).logits([text for text, _ in rows])
    done = []
    output = tmp_path / "out.parquet"
    result = predict_source(source, model, str(output), workers=2, on_progress=done.append)
    assert result["texts"] == 1300 == done[-1]
    written = pq.read_table(output)
    assert written["text"].to_pylist() == [text for text, _ in rows]
    assert written.schema.field("id").type == pa.int32()
    assert written["id"].to_pylist() == list(range(1300))
    assert written["input_label"].to_pylist() == [label for _, label in rows]
    scores = np.array([[one["neg"], one["pos"]] for one in written["scores"].to_pylist()])
    calibrated = TextClassifier(model).probabilities([text for text, _ in rows])
    np.testing.assert_allclose(scores, calibrated, atol=1e-2)  # two roundings of bf16

    metrics = evaluate(source, model, workers=1, on_progress=lambda n: None)
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
