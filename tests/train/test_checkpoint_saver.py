"""A run's checkpoints: when they are written and loaded, and failures of the storage."""

import contextlib
import threading
import time
from pathlib import Path

import pytest
from making import (
    Attempt,
    Scripted,
    committed,
    damage,
    make_corpus,
    pretrain_job,
    same_tensors,
)

from raybert.errors import StorageError, Superseded, UserError
from raybert.storage.folder import Folder
from raybert.train.metrics_log import MetricsLog, read_metrics
from raybert.train.run_folder import begin_attempt
from raybert.train.task import ControlSignals, Preempted, Stopped


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("loop")) / "corpus"
    make_corpus(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path) / "run"


def four_steps(corpus, **settings):
    values = {"checkpoint_steps": 1, "keep_checkpoints": 3, **settings}
    return pretrain_job(corpus, {"dropout": 0.1}, steps=4, **values)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The last checkpoint of an uninterrupted `four_steps`."""
    attempt = Attempt(four_steps(corpus), Folder(tmp_path_factory.mktemp("undisturbed")))
    attempt.run()
    return attempt.store.load(4)


def is_undisturbed(attempt, undisturbed):
    found = attempt.store.load(4)
    return same_tensors(found.model, undisturbed.model) and same_tensors(
        found.optimizer, undisturbed.optimizer
    )


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    ("how", "words"), [("bit", "is altered"), ("cut", "is cut short"), ("gone", "is missing")]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(
    corpus, run, undisturbed, file, how, words
):
    with pytest.raises(Stopped):
        Attempt(four_steps(corpus), run, stop_at=3).run()
    damage(committed(run, 3) / file, how)
    attempt = Attempt(four_steps(corpus), run)
    attempt.run()
    message = attempt.events()["damaged checkpoint"]
    assert f"step-00000003-a0001/{file}" in message
    assert words in message
    logged = [r["message"] for r in read_metrics(run) if r.get("event") == "damaged checkpoint"]
    assert logged == [message]
    assert attempt.of_kind("train")[0]["step"] == 3  # step 2's state was loaded
    assert is_undisturbed(attempt, undisturbed)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bit", "step-00000003-a0001.json is altered"),
        ("cut", "step-00000003-a0001.json is damaged"),
        ("gone", None),
    ],
)
def test_a_checkpoint_without_a_whole_commit_is_not_loaded(corpus, run, undisturbed, how, words):
    """Without a commit its files count as an unfinished upload, which is no damage."""
    with pytest.raises(Stopped):
        Attempt(four_steps(corpus), run, stop_at=3).run()
    damage(Path((run / "checkpoints").path) / "step-00000003-a0001.json", how)
    attempt = Attempt(four_steps(corpus), run)
    attempt.run()
    message = attempt.events().get("damaged checkpoint")
    assert message is None if words is None else words in message
    assert attempt.of_kind("train")[0]["step"] == 3
    assert is_undisturbed(attempt, undisturbed)
    assert not (run / "checkpoints").exists("step-00000003-a0001")


def test_resuming_where_a_checkpoint_is_due_does_not_write_it_again(corpus, run, monkeypatch):
    job = pretrain_job(corpus, steps=8, checkpoint_steps=4, keep_checkpoints=1)
    with pytest.raises(Stopped):
        Attempt(job, run, stop_at=4).run()
    assert committed(run, 4).name == "step-00000004-a0001"
    again = Attempt(job, run, stop_at=5)
    written = []
    write = again.store._write

    def notes(snapshot):
        written.append(snapshot.step)
        write(snapshot)

    monkeypatch.setattr(again.store, "_write", notes)
    with pytest.raises(Stopped):
        again.run()
    assert written == [5]
    assert again.store.steps() == [5]


def test_records_and_digests_are_stored_before_each_checkpoint(corpus, run, monkeypatch):
    """A resumed run does not repeat the steps before it, nor their records."""
    done = []
    attempt = Attempt(
        pretrain_job(corpus, steps=6, checkpoint_steps=2),
        run,
        before_save=lambda: done.append(("digests", attempt.loop.progress.step)),
    )
    monkeypatch.setattr(
        MetricsLog, "flush", lambda self: done.append(("metrics", attempt.loop.progress.step))
    )
    save = attempt.store.save
    monkeypatch.setattr(
        attempt.store,
        "save",
        lambda snapshot, **more: (done.append(("save", snapshot.step)), save(snapshot, **more)),
    )
    attempt.run()
    for step in (2, 4, 6):
        at = done.index(("save", step))
        assert {("digests", step), ("metrics", step)} <= set(done[:at])


def test_the_cost_of_each_checkpoint_is_logged_once_by_the_training_thread(corpus, run):
    """Over two attempts, the first of which is stopped between two checkpoints."""
    job = pretrain_job(corpus, steps=6, checkpoint_steps=2, keep_checkpoints=9)
    threads = []
    for stop_at in (3, None):
        attempt = Attempt(job, run, stop_at=stop_at)
        note = attempt.loop.log.on_record
        attempt.loop.log.on_record = lambda record, note=note: (
            note(record),
            threads.append(threading.current_thread()),
        )
        with pytest.raises(Stopped) if stop_at else contextlib.nullcontext():
            attempt.run()
    found = [r for r in read_metrics(run) if r["kind"] == "checkpoint"]
    assert [r["step"] for r in found] == [2, 3, 4, 6]
    for record in found:
        files = committed(run, record["step"]).iterdir()
        assert record["bytes"] == sum(file.stat().st_size for file in files)
    assert set(threads) == {threading.current_thread()}


def test_writing_in_the_background_does_not_count_as_stalled(corpus, run, monkeypatch):
    """Not even of the last checkpoint, which the loop waits for."""
    attempt = Attempt(pretrain_job(corpus, steps=2), run)
    write = attempt.store._write

    def write_when_counted(snapshot):
        ends = time.monotonic() + 30
        while not attempt.loop.saver._stalled:
            assert time.monotonic() < ends, "training waits as long as the writing takes"
            time.sleep(0.001)
        write(snapshot)

    monkeypatch.setattr(attempt.store, "_write", write_when_counted)
    attempt.run()
    [record] = attempt.of_kind("checkpoint")
    assert record["step"] == 2 and record["stalled"] > 0


def test_a_best_step_without_its_checkpoint_is_forgotten(corpus, run):
    job = pretrain_job(corpus, steps=6, evaluations=3, checkpoint_steps=1)
    first = Attempt(job, run, stop_at=5)
    with pytest.raises(Stopped):
        first.run()
    best = first.loop.progress.best_step
    assert best is not None
    (run / "checkpoints").delete(f"step-{best:08d}-a0001.json")
    again = Attempt(job, run)
    again.run()
    assert again.loop.progress.best_step == 6


def test_a_later_attempt_supersedes_the_older_one(corpus, run):
    old = Attempt(pretrain_job(corpus, checkpoint_steps=1), run)
    later = begin_attempt(run)
    assert later == 2
    with pytest.raises(Superseded, match="attempt 2 has taken over; attempt 1 ends here"):
        old.run()
    assert old.store.steps() == []


# A storage that refuses --------------------------------------------------------------------------


def refusing(attempt, monkeypatch, at):
    """Make the checkpoints of these steps fail, each by the time of the next step.

    Returns the steps whose checkpoints were tried.
    """
    tried, write, check = [], attempt.store._write, attempt.store.check

    def fails(snapshot):
        tried.append(snapshot.step)
        if snapshot.step in at:
            raise StorageError("writing it failed: No space left on device")
        write(snapshot)

    def check_when_written():
        if attempt.store._thread is not None:
            attempt.store._thread.join()
        check()

    monkeypatch.setattr(attempt.store, "_write", fails)
    monkeypatch.setattr(attempt.store, "check", check_when_written)
    return tried


def test_failed_checkpoints_are_reported_once_and_change_no_weights(
    corpus, run, undisturbed, monkeypatch
):
    attempt = Attempt(four_steps(corpus), run)
    tried = refusing(attempt, monkeypatch, at=[2, 3])
    assert attempt.run()["step"] == 4
    assert tried == [1, 2, 3, 4]
    events = [r for r in attempt.of_kind("event") if r["event"].startswith("checkpoint")]
    assert [r["event"] for r in events] == ["checkpoint failed", "checkpoint written"]
    assert events[0]["message"] == (
        "writing it failed: No space left on device; that of step 1 is kept; the next try is "
        "within a minute"
    )
    assert events[1]["message"] == "the checkpoint of step 4 is written"
    assert attempt.store.steps() == [1, 4]
    assert is_undisturbed(attempt, undisturbed)


@pytest.mark.parametrize(("pause", "expected"), [(0.0, [4, 5, 8]), (1e9, [4, 8])])
def test_a_failed_checkpoint_is_retried_after_the_pause(corpus, run, monkeypatch, pause, expected):
    monkeypatch.setattr("raybert.train.checkpoint_saver.RETRY_SECONDS", pause)
    attempt = Attempt(pretrain_job(corpus, steps=8, checkpoint_steps=4), run)
    tried = refusing(attempt, monkeypatch, at=[4])
    attempt.run()
    assert tried == expected


def test_with_stop_a_failed_checkpoint_ends_the_run_which_can_be_resumed(
    corpus, run, undisturbed, monkeypatch
):
    job = four_steps(corpus, on_checkpoint_failure="stop")
    attempt = Attempt(job, run)
    tried = refusing(attempt, monkeypatch, at=[2])
    with pytest.raises(UserError) as ended:
        attempt.run()
    assert str(ended.value) == (
        "writing it failed: No space left on device; fix the storage, and run it again to resume "
        "from the checkpoint of step 1, or set "
        "pretrain.on_checkpoint_failure=continue to train on without"
    )
    assert tried == [1, 2]
    assert attempt.store.steps() == [1]
    again = Attempt(job, run)
    again.run()
    assert again.of_kind("train")[0]["step"] == 2
    assert is_undisturbed(again, undisturbed)


@pytest.mark.parametrize("at", ["the end", "Ctrl-C"])
def test_with_stop_the_failure_of_the_last_checkpoint_is_an_error(corpus, run, monkeypatch, at):
    job = pretrain_job(corpus, steps=4, on_checkpoint_failure="stop")
    attempt = Attempt(job, run)
    refusing(attempt, monkeypatch, at=[4 if at == "the end" else 2])
    if at == "Ctrl-C":
        attempt.loop.signals = ControlSignals(stop=lambda: attempt.loop.progress.step == 2)
    with pytest.raises(UserError, match="there is no checkpoint yet: fix the storage, and run it"):
        attempt.run()


def test_reading_the_best_weights_is_retried(corpus, run, monkeypatch):
    """The last weights in their place would be another result."""

    class Scores(Scripted):
        def evaluate(self):
            return {**self._task.evaluate(), "score": -float(attempt.loop.progress.step)}

    attempt = Attempt(pretrain_job(corpus, steps=4, evaluations=2), run, change=Scores)
    load, failures = attempt.store.load, [1, 1]

    def fails_twice(step):
        if failures:
            failures.pop()
            raise StorageError("reading it failed: no answer")
        return load(step)

    monkeypatch.setattr(attempt.store, "load", fails_twice)
    monkeypatch.setattr("raybert.storage.retry.time.sleep", lambda seconds: None)
    result = attempt.run()
    assert (result["best_step"], failures) == (2, [])
    assert same_tensors(attempt.task.model.state_dict(), load(2).model)
    assert "no answer; retrying for up to 96 s" in attempt.events()["storage"]


# Control signals ---------------------------------------------------------------------------------


def test_a_save_signal_writes_a_checkpoint_of_that_step(corpus, run):
    attempt = Attempt(pretrain_job(corpus, steps=6, keep_checkpoints=9), run)
    attempt.loop.signals = ControlSignals(save=lambda: attempt.loop.progress.step in (2, 3))
    attempt.run()
    assert {2, 3} <= set(attempt.store.steps())


def test_a_preempted_run_saves_and_resumes_bit_for_bit(corpus, tmp_path):
    job = pretrain_job(corpus, {"dropout": 0.1}, steps=6)
    once = Attempt(job, Folder(tmp_path / "whole"))
    once.run()
    first = Attempt(job, Folder(tmp_path / "parted"))
    first.loop.signals = ControlSignals(preempt=lambda: first.loop.progress.step == 3)
    with pytest.raises(Preempted):
        first.run()
    assert "a node is being preempted" in first.events()["preempted"]
    again = Attempt(job, Folder(tmp_path / "parted"))
    again.run()
    assert [record["step"] for record in again.of_kind("train")] == [4, 5, 6]
    assert same_tensors(once.store.load(6).model, again.store.load(6).model)
