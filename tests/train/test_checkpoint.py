"""Checkpoints: what is committed, what is kept, who may commit."""

import pytest
import torch

from raybert.errors import StorageError, Superseded, UserError
from raybert.storage import Folder
from raybert.train.checkpoint import (
    FORMAT_VERSION,
    CheckpointStore,
    Snapshot,
    begin_attempt,
    check_attempt,
)


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path)


def snapshot(step):
    return Snapshot(
        step=step,
        model={"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)},
        optimizer={"weight|exp_avg": torch.arange(6.0).reshape(3, 2).to(torch.bfloat16)},
        state={"step": step, "best_score": None},
    )


def store_of(run, keep=2):
    return CheckpointStore(run, begin_attempt(run), keep)


def test_what_is_loaded_is_what_was_saved(run):
    store = store_of(run)
    store.save(snapshot(7), best_step=None, wait=True)
    found = store.load(7)
    assert found.step == 7
    assert found.state == {"step": 7, "best_score": None}
    assert torch.equal(found.model["weight"], torch.full((3, 2), 7.0))
    assert found.optimizer["weight|exp_avg"].dtype == torch.bfloat16
    assert torch.equal(found.optimizer["weight|exp_avg"], snapshot(7).optimizer["weight|exp_avg"])


def test_the_last_ones_and_the_best_are_kept(run):
    store = store_of(run, keep=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
        store.save(snapshot(step), best_step=best, wait=True)
    assert store.steps() == [2, 4, 5]
    folders = [name for name in (run / "checkpoints").names() if not name.endswith(".json")]
    assert folders == ["step-00000002", "step-00000004", "step-00000005"]
    store.save(snapshot(6), best_step=6, wait=True)
    assert store.steps() == [5, 6]


def test_files_without_a_commit_are_no_checkpoint(run):
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    store.save(snapshot(2), best_step=None, wait=True)
    (run / "checkpoints").delete("step-00000002.json")
    assert store.steps() == [1]
    assert store.load_latest(pytest.fail).step == 1


def test_nothing_is_committed_while_files_are_being_written(run, monkeypatch):
    store = store_of(run)
    write = Folder.write_bytes

    def breaks(self, name, data):
        if name == "state.json":
            raise StorageError(f"writing {self.join(name)} failed: No space left on device")
        write(self, name, data)

    monkeypatch.setattr(Folder, "write_bytes", breaks)
    with pytest.raises(StorageError, match="No space left"):
        store.save(snapshot(3), best_step=None, wait=True)
    assert store.steps() == []
    monkeypatch.undo()
    store.save(snapshot(4), best_step=None, wait=True)
    assert store.steps() == [4]
    assert (run / "checkpoints").names() == ["step-00000004", "step-00000004.json"]


def test_a_failure_in_the_background_is_raised_by_the_next_call(run, monkeypatch):
    store = store_of(run)
    monkeypatch.setattr(
        store, "_write", lambda snapshot: (_ for _ in ()).throw(StorageError("the disk is full"))
    )
    store.save(snapshot(1), best_step=None)
    with pytest.raises(StorageError, match="the disk is full"):
        store.wait()
    store.wait()  # told once


def test_only_the_youngest_attempt_commits(run):
    old, young = store_of(run), store_of(run)
    young.save(snapshot(1), best_step=None, wait=True)
    with pytest.raises(Superseded, match="attempt 2 has taken over; attempt 1 ends here"):
        old.save(snapshot(2), best_step=None, wait=True)
    assert young.steps() == [1]
    check_attempt(run, 2)
    with pytest.raises(Superseded):
        check_attempt(run, 1)


def test_attempts_are_numbered_past_nine_thousand(run):
    (run / "attempts").write_json("9999.json", {})
    assert begin_attempt(run) == 10000
    assert begin_attempt(run) == 10001


def test_a_newer_format_is_refused_by_name(run):
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    commit = (run / "checkpoints").read_json("step-00000001.json")
    (run / "checkpoints").write_json(
        "step-00000001.json", {**commit, "format_version": FORMAT_VERSION + 1}
    )
    # No damage that an older checkpoint could stand in for: going on would undo newer work.
    with pytest.raises(UserError, match=f"has format {FORMAT_VERSION + 1}.*upgrade raybert"):
        store.load_latest(pytest.fail)


@pytest.mark.parametrize(
    "commit", ["{}", "[]", "null", "3", '{"format_version": 1, "files": {"model.safetensors": {}}}']
)
def test_a_commit_of_another_shape_is_damaged(run, commit):
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    store.save(snapshot(2), best_step=None, wait=True)
    (run / "checkpoints").write_text("step-00000002.json", commit)
    told = []
    assert store.load_latest(told.append).step == 1
    assert len(told) == 1
    assert "step-00000002" in told[0]


def test_no_checkpoint_is_no_error(run):
    assert store_of(run).load_latest(pytest.fail) is None
