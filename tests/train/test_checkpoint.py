"""Checkpoints: commits, pruning, attempts, and damage."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import same_tensors

from raybert.errors import DamagedError, StorageError, Superseded, UserError
from raybert.storage.folder import Folder
from raybert.train.checkpoint import FORMAT_VERSION, CheckpointStore, Snapshot, _commit_checksum
from raybert.train.run_folder import begin_attempt, check_attempt
from raybert.train.tensor_file import DTYPES


@pytest.fixture
def run(anywhere):
    return anywhere


def snapshot(step):
    return Snapshot(
        step=step,
        model={"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)},
        optimizer={"weight|exp_avg": torch.arange(6.0).reshape(3, 2).to(torch.bfloat16)},
        state={"step": step, "best_score": None},
    )


def store_of(run, keep=2):
    return CheckpointStore(run, begin_attempt(run), keep)


def test_a_loaded_checkpoint_equals_the_saved_one(run):
    store = store_of(run)
    store.save(snapshot(7), best_step=None, wait=True)
    found = store.load(7)
    assert found.step == 7
    assert found.state == {"step": 7, "best_score": None}
    assert torch.equal(found.model["weight"], torch.full((3, 2), 7.0))
    assert found.optimizer["weight|exp_avg"].dtype == torch.bfloat16
    assert torch.equal(found.optimizer["weight|exp_avg"], snapshot(7).optimizer["weight|exp_avg"])


def drawn(dtype, shape, layout):
    """A tensor of small numbers; `turned`: not contiguous."""
    tensor = torch.randint(0, 2, shape).to(dtype)
    return tensor.movedim(0, -1) if layout == "turned" and shape else tensor


tensors = st.dictionaries(
    st.text(max_size=9),
    st.builds(
        drawn,
        st.sampled_from(list(DTYPES)),
        st.lists(st.integers(0, 5), max_size=3),
        st.sampled_from(["plain", "turned"]),
    ),
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(model=tensors, optimizer=tensors)
def test_tensors_of_any_type_and_shape_come_back(tmp_path_factory, model, optimizer):
    store = store_of(Folder(tmp_path_factory.mktemp("run")))
    store.save(Snapshot(1, model, optimizer), best_step=None, wait=True)
    found = store.load(1)
    for written, read in ((model, found.model), (optimizer, found.optimizer)):
        assert written.keys() == read.keys()
        for name, tensor in written.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def test_averages_come_back_and_only_they_need_the_newer_format(run):
    store, averages = store_of(run), {"weight": torch.full((3, 2), 0.5)}
    store.save(replace(snapshot(1), averages=averages), best_step=None, wait=True)
    store.save(snapshot(2), best_step=None, wait=True)
    assert same_tensors(store.load(1).averages, averages)
    assert same_tensors(store.load(1).optimizer, snapshot(1).optimizer)
    assert store.load(2).averages == {}
    commits = [f"step-0000000{step}-a0001.json" for step in (1, 2)]
    versions = [(run / "checkpoints").read_json(name)["format_version"] for name in commits]
    assert versions == [FORMAT_VERSION, 1]


def test_averages_that_format_1_kept_in_the_optimizers_file_are_read(run):
    store, average = store_of(run), torch.full((3, 2), 0.5)
    old = snapshot(1)
    old.optimizer["weight|average"] = average
    store.save(old, best_step=None, wait=True)
    assert (run / "checkpoints").read_json("step-00000001-a0001.json")["format_version"] == 1
    found = store.load(1)
    assert same_tensors(found.averages, {"weight": average})
    assert same_tensors(found.optimizer, snapshot(1).optimizer)


def test_the_last_checkpoints_and_the_best_are_kept(run):
    store = store_of(run, keep=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
        store.save(snapshot(step), best_step=best, wait=True)
    assert store.steps() == [2, 4, 5]
    folders = [name for name in (run / "checkpoints").names() if not name.endswith(".json")]
    assert folders == ["step-00000002-a0001", "step-00000004-a0001", "step-00000005-a0001"]
    store.save(snapshot(6), best_step=6, wait=True)
    assert store.steps() == [5, 6]


def test_files_without_a_commit_are_no_checkpoint(run):
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    store.save(snapshot(2), best_step=None, wait=True)
    (run / "checkpoints").delete("step-00000002-a0001.json")
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
    assert (run / "checkpoints").names() == ["step-00000004-a0001", "step-00000004-a0001.json"]


def test_a_failure_in_the_background_is_raised_once_by_the_next_call(run, monkeypatch):
    store = store_of(run)
    monkeypatch.setattr(
        store, "_write", lambda snapshot: (_ for _ in ()).throw(StorageError("the disk is full"))
    )
    store.save(snapshot(1), best_step=None)
    with pytest.raises(StorageError, match="the disk is full"):
        store.wait()
    store.wait()  # raised once


def test_a_committed_checkpoint_is_returned_once(run, monkeypatch):
    store = store_of(run)
    assert store.take_committed() is None
    store.save(snapshot(3), best_step=None, wait=True)
    record = store.take_committed()
    files = run / "checkpoints" / "step-00000003-a0001"
    assert record["step"] == 3
    assert record["bytes"] == sum(files.size(name) for name in files.names()) > 0
    assert record["written"] > 0
    assert store.take_committed() is None

    def breaks(self, name, value):
        raise StorageError(f"writing {self.join(name)} failed: No space left on device")

    monkeypatch.setattr(Folder, "write_json", breaks)  # the commit
    with pytest.raises(StorageError):
        store.save(snapshot(4), best_step=None, wait=True)
    assert store.take_committed() is None


def test_only_the_latest_attempt_commits(run):
    old, young = store_of(run), store_of(run)
    young.save(snapshot(1), best_step=None, wait=True)
    with pytest.raises(Superseded, match="attempt 2 has taken over; attempt 1 ends here"):
        old.save(snapshot(2), best_step=None, wait=True)
    assert young.steps() == [1]
    check_attempt(run, 2)
    with pytest.raises(Superseded):
        check_attempt(run, 1)


def test_a_superseded_attempt_leaves_the_later_ones_checkpoint_of_the_same_step(run):
    """It is superseded before it writes, while it writes, and before it prunes."""
    old = store_of(run, keep=1)
    old.save(snapshot(1), best_step=None, wait=True)
    young = store_of(run, keep=1)
    young.save(snapshot(2), best_step=None, wait=True)
    for step in (1, 2, 3):
        with pytest.raises(Superseded):
            old.save(snapshot(step), best_step=None, wait=True)
    with pytest.raises(Superseded):
        old._prune(1, None, replaces_later=False)
    assert (run / "checkpoints").names() == ["step-00000002-a0002", "step-00000002-a0002.json"]
    assert young.load_latest(pytest.fail).step == 2


def test_an_attempt_that_is_superseded_while_it_writes_does_not_commit(run, monkeypatch):
    old = store_of(run)
    write = Folder.write_bytes

    def superseded(self, name, data):
        write(self, name, data)
        if name == "optimizer.safetensors":
            monkeypatch.undo()
            store_of(run).save(snapshot(5), best_step=None, wait=True)

    monkeypatch.setattr(Folder, "write_bytes", superseded)
    with pytest.raises(Superseded):
        old.save(Snapshot(5, {"weight": torch.zeros(1)}, {}), best_step=None, wait=True)
    young = CheckpointStore(run, 2, keep=2)
    assert torch.equal(young.load(5).model["weight"], snapshot(5).model["weight"])


def test_a_commit_that_arrives_after_a_later_attempts_does_not_count(run, monkeypatch):
    """The write took minutes, after the last check for a later attempt."""
    old = store_of(run, keep=1)
    write = Folder.write_json

    def late(self, name, value):
        monkeypatch.undo()
        young = store_of(run, keep=1)
        young.save(snapshot(5), best_step=None, wait=True)
        young.save(snapshot(6), best_step=6, wait=True)
        young.save(snapshot(5), best_step=6, wait=True)  # as where 6 was damaged and it went back
        write(self, name, value)

    monkeypatch.setattr(Folder, "write_json", late)
    with pytest.raises(Superseded):
        old.save(Snapshot(5, {"weight": torch.zeros(1)}, {}), best_step=None, wait=True)
    young = CheckpointStore(run, 2, keep=2)
    assert torch.equal(young.load(5).model["weight"], snapshot(5).model["weight"])
    young.save(snapshot(7), best_step=5, wait=True)
    assert young.steps() == [5, 6, 7]
    assert [name for name in (run / "checkpoints").names() if "a0001" in name] == []


def test_commits_of_the_first_versions_without_an_attempt_are_read(run):
    store_of(run).save(snapshot(1), best_step=None, wait=True)
    folder = run / "checkpoints"
    folder.write_text("step-00000001.json", folder.read_text("step-00000001-a0001.json"))
    folder.delete("step-00000001-a0001.json")
    again = store_of(run, keep=1)
    assert again.load_latest(pytest.fail).step == 1
    again.save(snapshot(2), best_step=None, wait=True)
    assert again.steps() == [2]


def test_a_step_that_is_saved_again_is_loadable_throughout(run, monkeypatch):
    store = store_of(run, keep=1)
    store.save(snapshot(5), best_step=None, wait=True)
    write = Folder.write_bytes

    def breaks(self, name, data):
        if name == "state.json":
            raise StorageError("No space left on device")
        write(self, name, data)

    for resumes in (False, True):  # the same attempt, and one that resumed there
        writer = store_of(run, keep=1) if resumes else store
        monkeypatch.setattr(Folder, "write_bytes", breaks)
        with pytest.raises(StorageError):
            writer.save(snapshot(5), best_step=5, wait=True)
        assert store.load_latest(pytest.fail).step == 5
        monkeypatch.undo()
        writer.save(snapshot(5), best_step=5, wait=True)
        assert store.load_latest(pytest.fail).step == 5
        assert len((run / "checkpoints").names()) == 2  # what no commit names is gone


def test_what_a_later_attempt_writes_is_not_pruned(run):
    old = store_of(run, keep=1)
    young = CheckpointStore(run, 2, keep=1)  # registers only after the earlier one has looked
    young.save(snapshot(3), best_step=None, wait=True)
    (run / "checkpoints" / "step-00000004-a0002").write_text("model.safetensors", "half of it")
    old.save(snapshot(5), best_step=None, wait=True)
    names = (run / "checkpoints").names()
    assert {"step-00000003-a0002.json", "step-00000003-a0002", "step-00000004-a0002"} <= set(names)


def test_damaged_checkpoints_of_later_steps_do_not_displace_new_ones(run):
    store = store_of(run, keep=2)
    for step in (2, 10):
        store.save(snapshot(step), best_step=None, wait=True)
    (run / "checkpoints" / "step-00000010-a0001").write_text("state.json", "{")
    again = store_of(run, keep=1)
    assert again.load_latest(lambda message: None).step == 2
    again.save(snapshot(4), best_step=None, wait=True)
    assert again.load_latest(pytest.fail).step == 4


def test_a_run_whose_checkpoints_are_all_damaged_keeps_them(run):
    store = store_of(run)
    for step in (2, 4):
        store.save(snapshot(step), best_step=None, wait=True)
        (run / "checkpoints" / f"step-{step:08d}-a0001").delete("state.json")
    names, messages = (run / "checkpoints").names(), []
    with pytest.raises(
        DamagedError,
        match="every checkpoint of .* is damaged .*step-00000004-a0001"
        ".*; restore one, or delete .*checkpoints to start anew",
    ):
        store_of(run).load_latest(messages.append)
    assert len(messages) == 2
    assert (run / "checkpoints").names() == names


def test_checkpoints_that_the_storage_did_not_list_are_not_deleted(run, monkeypatch):
    """A run that starts again at step 0 would delete days of work otherwise."""
    store_of(run).save(snapshot(10), best_step=None, wait=True)
    again = store_of(run, keep=1)
    with monkeypatch.context() as stale:
        stale.setattr(again, "_commits", list)
        assert again.load_latest(pytest.fail) is None
    again.save(snapshot(2), best_step=None, wait=True)
    assert store_of(run).load_latest(pytest.fail).step == 10
    later = store_of(run)
    later.save(snapshot(3), best_step=None, wait=True, replaces_later=True)
    assert store_of(run).load_latest(pytest.fail).step == 3


def test_attempts_that_begin_at_the_same_time_get_different_numbers(run, monkeypatch):
    """Both list the numbers before either writes."""
    write, begun = Folder.write_json, []

    def meanwhile(self, name, value):
        if not begun:
            begun.append(None)
            begun[0] = begin_attempt(run)  # lists, writes and looks before the outer one writes
        write(self, name, value)

    monkeypatch.setattr(Folder, "write_json", meanwhile)
    number = begin_attempt(run)
    assert begun == [1]
    assert number > 1  # a gap may remain
    with pytest.raises(Superseded):
        check_attempt(run, 1)
    check_attempt(run, number)


def test_many_attempts_at_the_same_time_get_different_numbers(run):
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: begin_attempt(run), range(24)))
    assert len(set(numbers)) == 24


def test_attempts_are_numbered_past_nine_thousand(run):
    (run / "attempts").write_json("9999-0123abcd.json", {})
    assert begin_attempt(run) == 10000
    assert begin_attempt(run) == 10001


def test_a_newer_format_is_refused_by_name(run):
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    commit = (run / "checkpoints").read_json("step-00000001-a0001.json")
    del commit["sha256"]
    commit["format_version"] = FORMAT_VERSION + 1
    commit["sha256"] = _commit_checksum(commit)
    (run / "checkpoints").write_json("step-00000001-a0001.json", commit)
    # Not skipped as damaged: resuming from an older checkpoint would undo newer work.
    with pytest.raises(UserError, match=f"has format {FORMAT_VERSION + 1}.*upgrade raybert"):
        store.load_latest(pytest.fail)


@pytest.mark.parametrize(
    "commit",
    [
        "{}",
        "[]",
        "null",
        "3",
        '{"format_version": 1, "folder": "step-00000002-a0001", "files": {"a": {}}}',
    ],
)
def test_a_commit_of_another_shape_is_damaged(run, commit):
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    store.save(snapshot(2), best_step=None, wait=True)
    (run / "checkpoints").write_text("step-00000002-a0001.json", commit)
    messages = []
    assert store.load_latest(messages.append).step == 1
    assert len(messages) == 1
    assert "step-00000002" in messages[0]


def test_no_checkpoint_is_no_error(run):
    assert store_of(run).load_latest(pytest.fail) is None


def test_a_commit_without_a_checksum_of_its_own_is_read(run):
    """As the first versions wrote them."""
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    commit = (run / "checkpoints").read_json("step-00000001-a0001.json")
    del commit["sha256"]
    (run / "checkpoints").write_json("step-00000001-a0001.json", commit)
    assert store.load(1).step == 1


# Damage ------------------------------------------------------------------------------------------

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "commit"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with the checkpoints of steps 1 and 2, and the paths of the later one's files."""
    run = Folder(tmp_path_factory.mktemp("damage"))
    store = store_of(run)
    for step in (1, 2):
        store.save(snapshot(step), best_step=None, wait=True)
    checkpoints = Path(run.path) / "checkpoints"
    paths = {file: checkpoints / "step-00000002-a0001" / file for file in FILES[:-1]}
    return store, paths | {"commit": checkpoints / "step-00000002-a0001.json"}


def loaded(two, file, data):
    """Load with a file of the later checkpoint changed; returns the snapshot and messages."""
    store, paths = two
    whole, messages = paths[file].read_bytes(), []
    try:
        if data is None:
            paths[file].unlink()
        else:
            paths[file].write_bytes(data(whole))
        return store.load_latest(messages.append), messages
    finally:
        paths[file].write_bytes(whole)


def is_snapshot(found, step):
    expected = snapshot(step)
    return (
        same_tensors(found.model, expected.model)
        and same_tensors(found.optimizer, expected.optimizer)
        and (found.step, found.state) == (step, expected.state)
    )


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.integers(0, 1 << 20), st.integers(0, 7))
def test_a_checkpoint_with_a_flipped_bit_is_never_loaded_as_whole(two, file, at, bit):
    def flip(data):
        index = at % len(data)
        return data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]

    found, messages = loaded(two, file, flip)
    if found.step == 2:  # the name of the commit's own checksum was hit
        assert file == "commit" and messages == []
        assert is_snapshot(found, 2)
    else:
        [message] = messages
        assert "step-00000002" in message
        assert is_snapshot(found, 1)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_with_a_truncated_file_is_not_loaded(two, file, share):
    found, messages = loaded(two, file, lambda data: data[: int(share * len(data.rstrip()))])
    [message] = messages
    assert "step-00000002" in message
    assert is_snapshot(found, 1)


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_a_missing_file_is_not_loaded(two, file):
    found, messages = loaded(two, file, None)
    assert is_snapshot(found, 1)
    if file == "commit":  # without it there is no checkpoint that could be broken
        assert messages == []
    else:
        assert messages == [f"checkpoint file {two[1][file]} is missing"]


@pytest.mark.parametrize("whole", range(4))
def test_an_unfinished_upload_is_no_checkpoint_and_is_deleted(run, whole):
    """Some of its files are whole, the next is not, and there is no commit."""
    store_of(run).save(snapshot(1), best_step=None, wait=True)
    begun = run / "checkpoints" / "step-00000002-a0001"
    for file in FILES[:whole]:
        begun.write_bytes(file, (run / "checkpoints" / "step-00000001-a0001").read_bytes(file))
    if whole < 3:
        begun.write_bytes(FILES[whole], b"half of")
    again = store_of(run)
    assert again.load_latest(pytest.fail).step == again.last == 1
    again.save(snapshot(3), best_step=None, wait=True)
    assert (run / "checkpoints").names() == [
        "step-00000001-a0001", "step-00000001-a0001.json",
        "step-00000003-a0002", "step-00000003-a0002.json",
    ]  # fmt: skip


# A storage that refuses --------------------------------------------------------------------------


def refuse(monkeypatch, file, after=False):
    """Fail the writing of a file of each checkpoint, or, with `after`, its answer only."""
    write = Folder.write_bytes

    def breaks(folder, name, data):
        is_it = name == file or (file == "commit" and name.startswith("step-"))
        if after or not is_it:
            write(folder, name, data)
        if is_it:
            raise StorageError(f"writing {name} failed: No space left on device")

    monkeypatch.setattr(Folder, "write_bytes", breaks)


@pytest.mark.parametrize("file", FILES)
def test_the_files_of_a_failed_checkpoint_are_deleted(tmp_path, monkeypatch, file):
    run = Folder(tmp_path)
    store = store_of(run)
    store.save(snapshot(1), best_step=None, wait=True)
    before = (run / "checkpoints").names()
    refuse(monkeypatch, file)
    with pytest.raises(StorageError, match="No space left"):
        store.save(snapshot(2), best_step=None, wait=True)
    assert (run / "checkpoints").names() == before
    assert (store.last, store.is_failing) == (1, True)
    monkeypatch.undo()
    store.save(snapshot(3), best_step=None, wait=True)
    assert (store.last, store.is_failing) == (3, False)


def test_a_commit_whose_answer_was_lost_counts(run, monkeypatch):
    store = store_of(run)
    refuse(monkeypatch, "commit", after=True)
    with pytest.raises(StorageError):
        store.save(snapshot(2), best_step=None, wait=True)
    monkeypatch.undo()
    assert is_snapshot(store.load_latest(pytest.fail), 2)
    store.save(snapshot(3), best_step=2, wait=True)
    assert store.steps() == [2, 3]
    assert is_snapshot(store.load(2), 2)


def test_check_raises_a_failure_without_waiting(run, monkeypatch):
    store = store_of(run)
    store.check()
    refuse(monkeypatch, "state.json")
    store.save(snapshot(1), best_step=None)
    store._thread.join()
    assert not store.is_busy
    with pytest.raises(StorageError, match="No space left"):
        store.check()
    store.check()  # raised once


def test_beginning_an_attempt_is_retried(tmp_path, monkeypatch):
    (tmp_path / "attempts").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="attempts.* failed: "):
        begin_attempt(Folder(tmp_path))
    sleeps = []

    def meanwhile(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            (tmp_path / "attempts").unlink()

    monkeypatch.setattr("raybert.storage.retry.time.sleep", meanwhile)
    assert begin_attempt(Folder(tmp_path), retry_timeout_s=60) == 1
    assert sleeps == [0.5, 1.0, 2.0]
