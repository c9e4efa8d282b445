"""What the storage knows of trials, and how they are ranked."""

import json
import math

import pytest

from raybert.storage.folder import Folder
from raybert.train.metrics_log import MetricsLog
from raybert.tune.trial_store import (
    Evaluation,
    TrialRecord,
    TrialStore,
    count_states,
    ranked,
    write_trial,
)


@pytest.fixture
def ledger(tmp_path):
    return TrialStore(Folder(tmp_path) / "trials")


def log(ledger, name, attempt, first, scores):
    """Write an attempt's segment: an evaluation a step."""
    metrics = MetricsLog(ledger.run(name), attempt, first)
    for step, score in enumerate(scores, first + 1):
        metrics.write(
            {"kind": "eval", "step": step, "epoch": step / 2, "score": score, "accuracy": score}
            | {"loss": 1.0}
        )
    metrics.close()


def test_a_trial_is_read_as_it_was_written(ledger):
    opened = ledger.open("0003", {"finetune.lr": 1e-3, "finetune.kind": None}, 7)
    log(ledger, "0003", 1, 0, [0.5, 0.75, 0.7])
    [entry] = ledger.entries()
    assert (entry.name, entry.values, entry.seed) == ("0003", opened.values, 7)
    assert (entry.state, entry.begun) == ("waiting", opened.begun)
    assert [e.score for e in entry.evaluations] == [0.5, 0.75, 0.7]
    assert (entry.score, entry.best.step, entry.epoch) == (0.75, 2, 1.5)
    ledger.close(entry, "stopped", "stopped at epoch 1.5")
    [again] = ledger.entries()
    assert (again.state, again.why, again.ended) == ("stopped", "stopped at epoch 1.5", entry.ended)


def test_a_younger_attempt_counts_from_where_it_began(ledger):
    ledger.open("0000", {}, 0)
    log(ledger, "0000", 1, 0, [0.1, 0.9, 0.9])
    log(ledger, "0000", 2, 1, [0.2])
    [entry] = ledger.entries()
    assert [(e.step, e.score) for e in entry.evaluations] == [(1, 0.1), (2, 0.2)]


def test_a_run_that_was_over_unheard_is_finished(ledger):
    ledger.open("0000", {}, 0)
    ledger.run("0000").write_json("result.json", {"score": 1})
    assert ledger.entries()[0].state == "finished"


def test_what_a_trial_was_before_it_took_over_weights_does_not_count(ledger):
    ledger.open("0001", {"a": 1}, 0)
    log(ledger, "0001", 1, 0, [0.9, 0.9])
    log(ledger, "0001", 2, 2, [0.5, 0.6])
    exchange = {"from": "0000", "step": 2, "before": {"a": 1}, "after": {"a": 2}}
    write_trial(ledger.run("0001"), {"a": 2}, 0, 1.0, [exchange])
    [entry] = ledger.entries()
    assert entry.values == {"a": 2}
    assert entry.exchanges == [exchange]
    assert entry.score == 0.6


def test_what_is_no_trial_is_left_alone(ledger):
    ledger.folder.write_text("ray/attempt-1/tuner.pkl", "x")
    ledger.folder.write_text("note.txt", "x")
    assert ledger.entries() == []


def entry(name, score=None, state="finished"):
    evaluations = [] if score is None else [Evaluation(1, 1.0, score, score, 0.5, 0.0)]
    return TrialRecord(name, {}, 0, state, evaluations=evaluations)


def test_ranks_leave_out_what_failed_and_what_has_no_score():
    entries = [
        entry("0000", 0.5), entry("0001", 0.9, "failed"), entry("0002"), entry("0003", 0.7, "stop"),
        entry("0004", math.nan), entry("0005", 0.7),
    ]  # fmt: skip
    assert [e.name for e in ranked(entries)] == ["0003", "0005", "0000"]


def test_states_are_counted():
    entries = [entry("0", 1.0), entry("1", 1.0, "failed"), entry("2", None, "running")]
    assert count_states(entries) == {"finished": 1, "stopped": 0, "failed": 1, "running": 1}


def test_an_entry_is_json():
    shown = json.loads(json.dumps(entry("0000", 0.5).as_json()))
    assert (shown["trial"], shown["score"], shown["evaluations"]) == (
        "0000", 0.5, [[1.0, 0.5, 0.5, 0.0]],
    )  # fmt: skip
    assert entry("0001").as_json()["score"] is None
