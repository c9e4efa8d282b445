"""Metrics: one log by attempt, merged as if there had been one attempt; no line is lost."""

import json
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.storage.folder import Folder
from raybert.train import metrics_log
from raybert.train.metrics_log import (
    MERGED,
    LineLog,
    MetricsLog,
    ThroughputMeter,
    merge_metrics,
    read_metrics,
)


def train(step, **values):
    return {"kind": "train", "step": step, **values}


def steps(records, kind="train"):
    return [record["step"] for record in records if record["kind"] == kind]


def test_a_younger_attempt_replaces_what_it_computed_again(tmp_path):
    run = Folder(tmp_path)
    first = MetricsLog(run, 1, 0)
    for step in range(1, 8):
        first.write(train(step, by=1))
    first.close()
    second = MetricsLog(run, 2, 4)  # resumed from the checkpoint of step 4
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
def test_merged_steps_rise_and_have_no_gaps(attempts):
    """Each attempt starts where a checkpoint of those before stands, and lasts some steps."""
    with tempfile.TemporaryDirectory() as path:
        run, reached = Folder(path), 0
        for number, (start, lasts) in enumerate(attempts, 1):
            start = min(start, reached)
            log = MetricsLog(run, number, start)
            for step in range(start + 1, start + lasts + 1):
                log.write(train(step))
            log.close()
            reached = start + lasts
        assert steps(read_metrics(run)) == list(range(1, reached + 1))


def test_a_line_cut_short_is_left_out(tmp_path):
    run = Folder(tmp_path)
    log = MetricsLog(run, 1, 0)
    log.write(train(1))
    log.close()
    path = tmp_path / "metrics" / "0001.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert steps(read_metrics(run)) == [1]


def test_lines_are_there_at_once_and_strict_json(tmp_path):
    run = Folder(tmp_path)
    log = MetricsLog(run, 1, 0)
    log.write(train(1, loss=float("nan"), nested={"a": [float("inf"), 1.5]}))
    line = (tmp_path / "metrics" / "0001.jsonl").read_text().splitlines()[-1]
    log.close()
    found = json.loads(line, parse_constant=lambda name: 1 / 0)
    assert found["loss"] is None
    assert found["nested"] == {"a": [None, 1.5]}


def test_what_was_merged_before_the_end_is_merged_again(tmp_path):
    """The merged lines stood, the result did not: another attempt took the run to its end."""
    run = Folder(tmp_path)
    for attempt in (1, 2):
        log = MetricsLog(run, attempt, attempt)
        log.write(train(attempt + 1))
        log.close()
        merge_metrics(run)
    assert steps(read_metrics(run)) == [2, 3]


# A storage that refuses --------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """Every line tries again."""
    monkeypatch.setattr(metrics_log, "RETRY_SECONDS", 0.0)


@contextmanager
def files_of_at_most(size):
    """The kernel takes no byte beyond, and a part of what goes beyond: as a disk that fills."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


LINES = st.lists(
    st.tuples(st.text("abcü ", max_size=30), st.one_of(st.none(), st.integers(0, 40))), max_size=20
)


@settings(max_examples=100, deadline=None)
@given(LINES)
def test_there_are_only_whole_lines_and_in_the_end_all_of_them(lines):
    """Each line comes with the room that is left on the disk then: None is enough."""
    before, metrics_log.RETRY_SECONDS = metrics_log.RETRY_SECONDS, 0.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, told = Path(folder) / "sub" / "log", []
            log = LineLog(Folder(folder) / "sub", "log", told.append)
            written = b""
            for text, room in lines:
                size = path.stat().st_size if path.exists() else 0
                if room is None:
                    log.write(text)
                else:
                    with files_of_at_most(size + room):
                        log.write(text)
                written += f"{text}\n".encode()
                found = path.read_bytes() if path.exists() else b""
                assert written.startswith(found)
                assert found == b"" or found.endswith(b"\n")
                assert len(told) % 2 == (found != written)  # told once, and once when it is over
            log.close()
            assert (path.read_bytes() if path.exists() else b"") == written
            assert len(told) % 2 == 0
    finally:
        metrics_log.RETRY_SECONDS = before


def test_trouble_is_told_once_and_its_end_once(tmp_path, at_once):
    folder, told = Folder(tmp_path) / "sub", []
    (tmp_path / "sub").write_text("a file where the folder should be")
    log = LineLog(folder, "log", told.append)
    for number in range(3):
        log.write(str(number))
    [trouble] = told
    assert trouble.startswith(f"writing {tmp_path}/sub/log failed: ")
    assert trouble.endswith("; its lines wait until it can be written")
    (tmp_path / "sub").unlink()
    log.write("3")
    log.write("4")
    assert told[1:] == [f"{tmp_path}/sub/log is written again"]
    log.close()
    assert folder.read_text("log") == "0\n1\n2\n3\n4\n"
    assert len(told) == 2


def test_a_refusing_storage_is_not_asked_at_every_line(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log, "RETRY_SECONDS", 1e9)
    (tmp_path / "sub").write_text("in the way")
    log = LineLog(Folder(tmp_path) / "sub", "log")
    log.write("a")
    (tmp_path / "sub").unlink()
    log.write("b")
    assert not (tmp_path / "sub").exists()
    log.flush()  # before a checkpoint, after which these lines would not come again
    assert (tmp_path / "sub" / "log").read_text() == "a\nb\n"
    log.close()


def test_what_waits_is_bounded_and_what_is_lost_is_told(tmp_path, at_once, monkeypatch):
    monkeypatch.setattr(metrics_log, "MOST_WAITING", 20)
    (tmp_path / "sub").write_text("in the way")
    told = []
    log = LineLog(Folder(tmp_path) / "sub", "log", told.append)
    for number in range(10, 20):
        log.write(f"line {number}")  # eight bytes with its end
    (tmp_path / "sub").unlink()
    log.write("line 20")
    log.close()
    assert (tmp_path / "sub" / "log").read_text() == "line 18\nline 19\nline 20\n"
    assert told[1] == f"{tmp_path}/sub/log is written again, without 8 lines"


def test_lines_that_never_can_be_written_are_told_at_the_end(tmp_path, at_once):
    (tmp_path / "sub").write_text("in the way")
    told = []
    log = LineLog(Folder(tmp_path) / "sub", "log", told.append)
    log.write("a")
    log.write("b")
    log.close()
    assert told[1:] == [f"{tmp_path}/sub/log lacks the last 2 lines"]


def test_who_is_told_may_write_a_line_about_it(tmp_path, at_once):
    """As the loop does: the trouble is an event among the others."""
    (tmp_path / "metrics").write_text("in the way")
    run, logs = Folder(tmp_path), []

    def tell(text):
        if logs:
            logs[0].write({"kind": "event", "step": 1, "event": "storage", "message": text})

    logs.append(MetricsLog(run, 1, 0, tell=tell))
    logs[0].write(train(1))
    (tmp_path / "metrics").unlink()
    logs[0].write(train(2))
    logs[0].close()
    found = read_metrics(run)
    assert steps(found) == [1, 2]
    assert [r["message"][-10:] for r in found if r.get("event") == "storage"] == ["tten again"]


def test_an_object_stores_lines_are_there_when_they_are_flushed(bucket):
    log = LineLog(bucket / "sub", "log")
    log.write("a")
    assert not (bucket / "sub").exists("log")
    log.flush()
    assert (bucket / "sub").read_text("log") == "a\n"
    log.write("b")
    log.close()
    assert (bucket / "sub").read_text("log") == "a\nb\n"


def test_an_object_stores_lines_go_on_in_files_of_a_size(bucket, monkeypatch):
    """What a long run has logged is neither kept in memory nor written again and again."""
    monkeypatch.setattr("raybert.train.metrics_log.CHUNK_BYTES", 500)
    for attempt, first in ((1, 0), (2, 40)):
        log = MetricsLog(bucket, attempt, first)
        for step in range(first + 1, first + 61):
            log.write(train(step))
            log.flush()
        log.close()
    names = (bucket / "metrics").names()
    assert {"0001.jsonl", "0001.000001.jsonl", "0002.jsonl", "0002.000001.jsonl"} <= set(names)
    assert all(size < 1000 for size in (bucket / "metrics").sizes().values())
    assert steps(read_metrics(bucket)) == list(range(1, 101))


def test_lines_outlive_an_object_store_that_refuses(bucket, proxy, at_once):
    through, connection = proxy
    told = []
    log = LineLog(through, "log", told.append)
    log.write("a")
    log.flush()
    connection.refuse()
    for line in "bc":
        log.write(line)
        log.flush()
    assert bucket.read_text("log") == "a\n"
    connection.mend()
    log.write("d")
    log.flush()
    assert bucket.read_text("log") == "a\nb\nc\nd\n"
    log.close()
    assert [text.rpartition(" ")[2] for text in told] == ["written", "again"]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(Folder(tmp_path)) == []


def test_rates_are_of_the_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("raybert.train.metrics_log.time.perf_counter", lambda: now[0])
    rate = ThroughputMeter()
    for _ in range(4):
        now[0] += 0.5
        rate.add(1000, 0.125)
    assert rate.read() == {"tokens_per_second": 2000.0, "step_seconds": 0.5, "data_wait": 0.125}
    now[0] += 1
    rate.add(10, 0.0)
    assert rate.read()["tokens_per_second"] == 10.0
