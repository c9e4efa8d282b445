"""Trackers: what they get, and that none of them can hurt a run."""

import socket
import threading
import time

import pytest
from making import Attempt, make_corpus, pretrain_job

from raybert.config import build, dump
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.storage.folder import Folder
from raybert.train import trackers
from raybert.train.run import train_in_process
from raybert.train.task import Stopped
from raybert.train.trackers import Trackers


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path) / "pretrain"


def configure(run, *names):
    experiment = build(Experiment, {"run": {"name": "mine", "trackers": list(names)}}, "test")
    run.write_text("config.yaml", dump(experiment))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("corpus"))
    make_corpus(folder)
    return folder


def events_of(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(path))
    found.Reload()
    return {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}


def test_tensorboard_has_the_curves(corpus, run):
    configure(run, "tensorboard")
    result = train_in_process(pretrain_job(corpus), run, on_progress=lambda record: None)
    curves = events_of(run / "tensorboard")
    assert [event.step for event in curves["train/loss"]] == [1, 2, 3, 4]
    assert curves["validation/loss"][-1].value == pytest.approx(result["loss"], abs=1e-4)
    assert not any(name.endswith("/step") for name in curves)


def test_without_trackers_nothing_is_imported_or_written(corpus, run):
    configure(run)
    train_in_process(pretrain_job(corpus), run, on_progress=lambda record: None)
    assert not run.exists("tensorboard") and not run.exists(trackers.IDS)


class Recorder:
    """A tracker in memory."""

    def __init__(self):
        self.steps, self.results, self.opened = [], [], None

    def open(self, run, known):
        self.opened = (run.experiment, run.stage, run.settings.get("pretrain.lr"), known)
        return known or "id-1"

    def log(self, values, step, seconds):
        self.steps.append((step, values))

    def finish(self, result, model):
        self.results.append((result, model))


class Failing(Recorder):
    def log(self, values, step, seconds):
        raise OSError("the server is down\nand more")


class Hanging(Recorder):
    def open(self, run, known):
        server = socket.create_server(("127.0.0.1", 0))
        with socket.create_connection(server.getsockname()) as client:
            client.recv(1)  # never answered


def test_the_end_of_a_run_does_not_wait_for_ever(run, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Hanging)
    monkeypatch.setattr(trackers, "END_SECONDS", 0.2)
    configure(run, "mlflow")
    found = Trackers(run, 0)
    assert found.finish({"loss": 1.0}) == [
        "run.trackers: mlflow gets no more records: it has not ended within 0.2 s"
    ]


def messages(records):
    return [r["message"] for r in records if r["kind"] == "event" and r["event"] == "tracker"]


def test_a_tracker_gets_settings_metrics_and_the_result(corpus, run, monkeypatch):
    made = []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda: made.append(Recorder()) or made[-1])
    configure(run, "wandb")
    job = pretrain_job(corpus)
    train_in_process(job, run, on_progress=lambda record: None)
    [tracker] = made
    assert tracker.opened == ("mine", "pretrain", Experiment().pretrain.lr, None)
    assert [step for step, values in tracker.steps if "train/loss" in values] == [1, 2, 3, 4]
    [(result, model)] = tracker.results
    assert result["loss"] > 0 and model == (run / "model").path
    assert run.read_json(trackers.IDS) == {"wandb": "id-1"}
    again = Trackers(run, 3)
    again.leave()
    again._followers[0].wait(10)
    assert made[-1].opened[3] == "id-1"  # a resumed run goes on there


def test_a_tracker_that_fails_costs_one_message(corpus, run, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Failing)
    configure(run, "mlflow")
    records = []
    result = train_in_process(pretrain_job(corpus), run, on_progress=records.append)
    assert result["step"] == 4
    assert messages(records) == ["run.trackers: mlflow gets no more records: the server is down"]


def test_a_tracker_that_hangs_costs_one_message(corpus, run, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Hanging)
    monkeypatch.setattr(trackers, "MAX_WAITING", 2)
    configure(run, "mlflow", "tensorboard")
    records = []
    result = train_in_process(pretrain_job(corpus), run, on_progress=records.append)
    assert result["step"] == 4
    assert messages(records) == ["run.trackers: mlflow gets no more records: 2 records wait for it"]
    assert "train/loss" in events_of(run / "tensorboard")  # the other one works on


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_costs_one_message(run, monkeypatch, name):
    def no_module(module):
        raise ModuleNotFoundError(f"No module named '{module}'")

    monkeypatch.setattr(trackers.importlib, "import_module", no_module)
    configure(run, name)
    found = Trackers(run, 0)
    told = found.finish({})
    assert len(told) == 1 and "No module named" in told[0] and "pip install 'raybert[" in told[0]
    assert found.finish({}) == []


def test_an_interrupted_attempt_leaves_its_trackers(corpus, run, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Recorder)
    configure(run, "mlflow")
    before = threading.active_count()
    attempt = Attempt(pretrain_job(corpus), run, stop_at=2)
    with pytest.raises(Stopped):
        attempt.run()
    attempt.loop.log.leave_trackers()
    end = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="'tensorboard', 'mlflow' or 'wandb'"):
        build(Experiment, {"run": {"trackers": ["tensorbord"]}}, "")


def test_mlflow_itself(corpus, run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    configure(run, "mlflow")
    records = []
    train_in_process(pretrain_job(corpus), run, on_progress=records.append)
    assert messages(records) == []
    client = mlflow.MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")] == [
        1,
        2,
        3,
        4,
    ]
    assert found.data.params["pretrain.lr"] and found.info.status == "FINISHED"


def test_weights_and_biases_itself(corpus, run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    configure(run, "wandb")
    records = []
    train_in_process(pretrain_job(corpus), run, on_progress=records.append)
    assert messages(records) == []
    assert [name for name in (run / "wandb").names() if name.startswith("offline-run")]
