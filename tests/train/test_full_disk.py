"""Training on a full disk: a small filesystem is mounted, and a file fills it."""

import os
import subprocess
import time
from contextlib import suppress

import pytest
from commands import Experiment, Result, refused, start, wait_for
from making import make_corpus, pretrain_job, same_tensors

from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.metrics_log import read_metrics
from raybert.train.run import train_in_process
from raybert.train.run_folder import read_digests


@pytest.fixture
def disk(tmp_path):
    """A filesystem of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(disk):
    """Fill the disk to its last page."""
    with suppress(OSError), open(disk / "filler", "ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("full")) / "corpus"
    make_corpus(folder)
    return folder


def state(run):
    return CheckpointStore(run, 99, 2).load(10)


def test_a_run_on_a_full_disk_reports_it_and_continues(corpus, disk, tmp_path, monkeypatch):
    monkeypatch.setattr("raybert.train.line_log.RETRY_SECONDS", 0.0)
    settings = {"steps": 10, "checkpoint_steps": 2, "digests": True}
    job = pretrain_job(corpus, {"dropout": 0.1}, **settings)
    run, events_seen = Folder(disk) / "run", []

    def watch(record):
        if record["kind"] == "event":
            events_seen.append((record["event"], record["message"]))
        if record["kind"] == "train" and record["step"] == 3:
            fill(disk)
        if record["kind"] == "train" and record["step"] == 6:  # the one of step 4 has failed
            assert CheckpointStore(run, 99, 2).load_latest(pytest.fail).step == 2
        if record["kind"] == "train" and record["step"] == 7:
            os.remove(disk / "filler")

    result = train_in_process(job, run, on_progress=watch)
    assert (result["step"], result["restarts"]) == (10, 0)
    events = [event for event, _ in events_seen]
    assert events.count("checkpoint failed") == events.count("checkpoint written") == 1
    message = dict(events_seen)["checkpoint failed"]
    assert "No space left on device; that of step 2 is kept" in message

    undisturbed = Folder(tmp_path / "undisturbed")
    train_in_process(job, undisturbed, on_progress=lambda record: None)
    assert same_tensors(state(run).model, state(undisturbed).model)
    assert same_tensors(state(run).optimizer, state(undisturbed).optimizer)
    assert read_digests(run) == read_digests(undisturbed)
    steps = [r["step"] for r in read_metrics(run) if r["kind"] == "train"]
    assert steps == list(range(1, 11))
    assert {name.removesuffix(".json")[:13] for name in (run / "checkpoints").names()} == {
        "step-00000008", "step-00000010",
    }  # fmt: skip


def test_a_command_that_ends_on_a_full_disk_prints_one_line_and_resumes(raybert, disk, tmp_path):
    experiment = Experiment(tmp_path, folder=Folder(disk))
    command = ("pretrain", "-c", experiment.config, "--bare")
    stops = ("--set", "pretrain.on_checkpoint_failure=stop")
    run = experiment.folder / "pretrain"
    process = start(*command, *stops, "--set", "pretrain.steps=100000")
    try:
        commits = disk / "runs" / "tiny" / "pretrain" / "checkpoints" / "step-*.json"
        wait_for(commits, process)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            fill(disk)  # again, where pruning has freed space
            time.sleep(0.01)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    message = refused(Result(process.returncode, out, err))
    last = CheckpointStore(run, 99, 2).load_latest(pytest.fail).step
    assert "No space left on device" in message
    assert f"run it again to resume from the checkpoint of step {last:,}" in message
    assert "pretrain.on_checkpoint_failure=continue" in message
    os.remove(disk / "filler")
    done = raybert(*command, *stops, "--set", f"pretrain.steps={last + 2}", "--json")
    assert done.code == 0, done.err
    assert (done.json["step"], done.json["restarts"]) == (last + 2, 1)
