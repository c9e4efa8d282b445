"""What the storage knows of trials, and how they are ranked."""

import json
import math

import pytest
from making import metrics_log

from raybert.storage.folder import Folder
from raybert.tune.trial_store import (
    Evaluation,
    TrialRecord,
    TrialStore,
    count_states,
    rank_trials,
    write_trial,
)


@pytest.fixture
def store(tmp_path):
    return TrialStore(Folder(tmp_path) / "trials")


def log(store, name, attempt, first, scores):
    """Write an attempt's segment of the metrics log, with one evaluation a step."""
    metrics = metrics_log(store.folder_of(name), attempt, first)
    for step, score in enumerate(scores, first + 1):
        metrics.write(
            {"kind": "eval", "step": step, "epoch": step / 2, "score": score, "accuracy": score}
            | {"loss": 1.0}
        )
    metrics.close()


def test_a_trial_is_read_as_it_was_written(store):
    created = store.create("0003", {"finetune.lr": 1e-3, "finetune.kind": None}, 7)
    log(store, "0003", 1, 0, [0.5, 0.75, 0.7])
    [trial] = store.read_all()
    assert (trial.name, trial.values, trial.seed) == ("0003", created.values, 7)
    assert (trial.state, trial.started) == ("waiting", created.started)
    assert [e.score for e in trial.evaluations] == [0.5, 0.75, 0.7]
    assert (trial.score, trial.best.step, trial.epoch) == (0.75, 2, 1.5)
    store.close(trial, "stopped", "stopped at epoch 1.5")
    [again] = store.read_all()
    assert (again.state, again.reason, again.ended) == (
        "stopped",
        "stopped at epoch 1.5",
        trial.ended,
    )


def test_a_later_attempt_replaces_the_steps_after_its_start(store):
    store.create("0000", {}, 0)
    log(store, "0000", 1, 0, [0.1, 0.9, 0.9])
    log(store, "0000", 2, 1, [0.2])
    [trial] = store.read_all()
    assert [(e.step, e.score) for e in trial.evaluations] == [(1, 0.1), (2, 0.2)]


def test_a_run_with_a_result_is_finished_even_without_an_outcome(store):
    store.create("0000", {}, 0)
    store.folder_of("0000").write_json("result.json", {"score": 1})
    assert store.read_all()[0].state == "finished"


def test_evaluations_before_an_exploit_do_not_count(store):
    store.create("0001", {"a": 1}, 0)
    log(store, "0001", 1, 0, [0.9, 0.9])
    log(store, "0001", 2, 2, [0.5, 0.6])
    exploit = {"from": "0000", "step": 2, "before": {"a": 1}, "after": {"a": 2}}
    write_trial(store.folder_of("0001"), {"a": 2}, 0, 1.0, [exploit])
    [trial] = store.read_all()
    assert trial.values == {"a": 2}
    assert trial.exploits == [exploit]
    assert trial.score == 0.6


def test_other_files_are_ignored(store):
    store.folder.write_text("ray/attempt-1/tuner.pkl", "x")
    store.folder.write_text("note.txt", "x")
    assert store.read_all() == []


def trial(name, score=None, state="finished"):
    evaluations = [] if score is None else [Evaluation(1, 1.0, score, score, 0.5, 0.0)]
    return TrialRecord(name, {}, 0, state, evaluations=evaluations)


def test_failed_trials_and_trials_without_a_score_have_no_rank():
    trials = [
        trial("0000", 0.5), trial("0001", 0.9, "failed"), trial("0002"), trial("0003", 0.7, "stop"),
        trial("0004", math.nan), trial("0005", 0.7),
    ]  # fmt: skip
    assert [e.name for e in rank_trials(trials)] == ["0003", "0005", "0000"]


def test_states_are_counted():
    trials = [trial("0", 1.0), trial("1", 1.0, "failed"), trial("2", None, "running")]
    assert count_states(trials) == {"finished": 1, "stopped": 0, "failed": 1, "running": 1}


def test_a_trial_is_written_as_json():
    shown = json.loads(json.dumps(trial("0000", 0.5).as_json("accuracy")))
    assert (shown["trial"], shown["score"], shown["evaluations"]) == (
        "0000", 0.5, [[1.0, 0.5, 0.5, 0.0]],
    )  # fmt: skip
    assert trial("0001").as_json("accuracy")["score"] is None
