"""Metrics: a segment for each attempt, merged as if there had been one attempt."""

import json
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from making import metrics_log

from raybert.storage.folder import Folder
from raybert.train.metrics_log import MERGED, merge_metrics, parse_lines, read_log, read_metrics


def train(step, **values):
    return {"kind": "train", "step": step, **values}


def steps(records, kind="train"):
    return [record["step"] for record in records if record["kind"] == kind]


def test_a_later_attempt_replaces_the_steps_that_it_computed_again(tmp_path):
    run = Folder(tmp_path)
    first = metrics_log(run, 1, 0)
    for step in range(1, 8):
        first.write(train(step, by=1))
    first.close()
    second = metrics_log(run, 2, 4)  # resumed from the checkpoint of step 4
    for step in range(5, 10):
        second.write(train(step, by=2))
    second.close()
    records = read_metrics(run)
    assert steps(records) == list(range(1, 10))
    assert [r["by"] for r in records if r["kind"] == "train"] == [1] * 4 + [2] * 5
    assert [r["attempt"] for r in records if r.get("event") == "start"] == [1, 2]
    merge_metrics(run)
    assert read_metrics(run) == records
    assert len(run.read_text(MERGED).splitlines()) == len(records)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=5))
def test_merged_steps_increase_without_gaps(attempts):
    """Each attempt starts at a checkpoint of an earlier one, and takes some steps."""
    with tempfile.TemporaryDirectory() as path:
        run, reached = Folder(path), 0
        for number, (start, lasts) in enumerate(attempts, 1):
            start = min(start, reached)
            log = metrics_log(run, number, start)
            for step in range(start + 1, start + lasts + 1):
                log.write(train(step))
            log.close()
            reached = start + lasts
        assert steps(read_metrics(run)) == list(range(1, reached + 1))


LINE_BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\r"  # of `str.splitlines`, beside the line feed


@given(
    messages=st.lists(st.text(st.characters(categories=None) | st.sampled_from(LINE_BREAKS))),
    cut=st.integers(1, 40),
)
@example(messages=[LINE_BREAKS, "\ud800 alone", "ü"], cut=8)
def test_a_record_may_hold_any_text_and_a_torn_one_is_dropped_and_told(messages, cut):
    """The last attempt was killed while it wrote a line, inside of a character or between two."""
    with tempfile.TemporaryDirectory() as path:
        run = Folder(path)
        log = metrics_log(run, 1, 0)
        for step, message in enumerate(messages, 1):
            log.write(train(step, text=message))
        log.close()
        before = read_log(run)
        assert [r["text"] for r in before.records[1:]] == messages and not before.damaged
        torn = json.dumps(train(99, text="ü" * 20), ensure_ascii=False).encode()[:cut]
        segment = Path(path) / "metrics" / "0001.jsonl"
        segment.write_bytes(segment.read_bytes() + torn)
        assert read_log(run) == (before.records, 1)
        assert merge_metrics(run) == f"1 lines of {path}/metrics are no records and were left out"
        merged = read_log(run)
        assert (merged.records[:-1], merged.damaged) == (before.records, 0)
        assert merged.records[-1]["event"] == "damaged log"


@given(st.lists(st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["kind", "step", "time", "loss"]), inner, max_size=4),
).map(lambda value: json.dumps(value).encode()), max_size=6))  # fmt: skip
def test_any_bytes_are_a_log(lines):
    """What is no record is counted, whatever it is, and the run can finish."""
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "metrics").mkdir()
        (Path(path) / "metrics" / "0001.jsonl").write_bytes(b"\n".join(lines))
        run = Folder(path)
        found = read_log(run)
        merge_metrics(run)
        assert read_metrics(run)[: len(found.records)] == found.records
        assert all(type(r["step"]) is int and isinstance(r["kind"], str) for r in found.records)


def test_deep_json_is_no_record():
    assert parse_lines(b'{"kind": "train", "step": 1}\n' + b"[" * 100_000) == (
        [{"kind": "train", "step": 1}],
        1,
    )


def test_records_are_written_at_once_as_strict_json(tmp_path):
    run = Folder(tmp_path)
    log = metrics_log(run, 1, 0)
    log.write(train(1, loss=float("nan"), nested={"a": [float("inf"), 1.5]}))
    line = (tmp_path / "metrics" / "0001.jsonl").read_text().splitlines()[-1]
    log.close()
    found = json.loads(line, parse_constant=lambda name: 1 / 0)
    assert found["loss"] is None
    assert found["nested"] == {"a": [None, 1.5]}


def test_metrics_are_merged_again_after_a_later_attempt(tmp_path):
    """The first attempt was killed between merging and writing the result."""
    run = Folder(tmp_path)
    for attempt in (1, 2):
        log = metrics_log(run, attempt, attempt)
        log.write(train(attempt + 1))
        log.close()
        merge_metrics(run)
    assert steps(read_metrics(run)) == [2, 3]


def test_a_message_about_the_log_may_be_written_to_it(tmp_path, monkeypatch):
    """As the loop does: a failure to write is an event among the others."""
    monkeypatch.setattr("raybert.train.line_log.RETRY_SECONDS", 0.0)
    (tmp_path / "metrics").write_text("in the way")
    run, shown = Folder(tmp_path), []
    log = metrics_log(run, 1, 0, on_record=shown.append)
    log.write(train(1))
    (tmp_path / "metrics").unlink()
    log.write(train(2))
    log.close()
    found = read_metrics(run)
    assert steps(found) == [1, 2]
    messages = [r["message"] for r in found if r.get("event") == "storage"]
    assert [message[-10:] for message in messages] == ["be written", "tten again"]
    assert [r["message"] for r in shown if r.get("event") == "storage"] == messages


def test_on_an_object_store_a_segment_is_several_files(bucket, monkeypatch):
    """The records of a long run are neither kept in memory nor written again and again."""
    monkeypatch.setattr("raybert.train.line_log.CHUNK_BYTES", 500)
    for attempt, first in ((1, 0), (2, 40)):
        log = metrics_log(bucket, attempt, first)
        for step in range(first + 1, first + 61):
            log.write(train(step))
            log.flush()
        log.close()
    names = (bucket / "metrics").names()
    assert {"0001.jsonl", "0001.000001.jsonl", "0002.jsonl", "0002.000001.jsonl"} <= set(names)
    assert all(size < 1000 for size in (bucket / "metrics").sizes().values())
    assert steps(read_metrics(bucket)) == list(range(1, 101))


def test_a_run_without_segments_has_no_metrics(tmp_path):
    assert read_metrics(Folder(tmp_path)) == []
