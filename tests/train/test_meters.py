"""Metrics: one log by attempt, merged as if there had been one attempt."""

import json

from hypothesis import given
from hypothesis import strategies as st

from raybert.storage import Folder
from raybert.train.meters import MERGED, MetricsLog, Rate, merge_metrics, read_metrics


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
    import tempfile

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


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(Folder(tmp_path)) == []


def test_rates_are_of_the_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("raybert.train.meters.time.perf_counter", lambda: now[0])
    rate = Rate()
    for _ in range(4):
        now[0] += 0.5
        rate.add(1000, 0.125)
    assert rate.read() == {"tokens_per_second": 2000.0, "step_seconds": 0.5, "data_wait": 0.125}
    now[0] += 1
    rate.add(10, 0.0)
    assert rate.read()["tokens_per_second"] == 10.0
