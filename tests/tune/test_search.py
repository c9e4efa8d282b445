"""Whole searches on Ray Tune: results, failures, schedulers, interruptions."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from making import searchable

from raybert.config import load
from raybert.errors import RaybertError
from raybert.experiment import Experiment
from raybert.model import huggingface
from raybert.pipeline import stages
from raybert.pipeline.tune_stage import tune
from raybert.storage.folder import Folder
from raybert.storage.registry import Registry
from raybert.terminal.display import Display
from raybert.train.metrics_log import read_metrics
from raybert.tune.trial_store import TrialStore

QUIET = Display(quiet=True)


def files(folder):
    return {path.name for path in Path(folder.path).iterdir()}


@pytest.mark.ray
def test_a_search_from_start_to_winner(ray_session, tmp_path, capsys):
    experiment = searchable(tmp_path, tune={"finalists": 2, "seeds": 2})
    stage = experiment.folder / "tune"
    result = tune(experiment, QUIET)
    assert result["trials"] == {"all": 4, "finished": 4, "stopped": 0, "failed": 0}
    assert result["default"]["config"] == {"finetune.lr": 1e-2}
    assert result["best"]["seeds"]["n"] == 2
    for key in ("mean", "std"):
        assert result["best"]["seeds"]["accuracy"][key] is not None
    assert result["best"]["seeds"]["score"]["mean"] >= result["default"]["seeds"]["score"]["mean"]
    assert result["test"]["n"] == 60
    assert capsys.readouterr().out == ""  # standard output is kept for the result

    _, labels = huggingface.load_classifier(Folder(result["model"]))
    assert labels == ["neg", "pos"]
    assert huggingface.read_preprocessing(Folder(result["model"]))["seq_len"] == 64
    winner = load(Experiment, result["config"])
    assert winner.finetune.lr == result["best"]["config"]["finetune.lr"]
    assert winner.finetune.seed == experiment.finetune.seed + int(result["run"][-1])

    trials = TrialStore(stage / "trials").read_all()
    assert [e.name for e in trials] == ["0000", "0001", "0002", "0003"]
    assert all(len(e.evaluations) == 3 and e.seconds > 0 for e in trials)
    # Trials are runs like any other; what only a resumed trial would need was deleted.
    assert {"config.yaml", "metrics.jsonl", "result.json"} <= files(stage / "trials" / "0000")
    assert not {"checkpoints", "model"} & files(stage / "trials" / "0000")
    assert "ray" not in files(stage)
    shown = stage.read_json("trials.json")
    assert [t["trial"] for t in shown["trials"]] == [e.name for e in trials]
    assert list((tmp_path / "runs/tiny/tune/tensorboard/0000").glob("events*"))

    before = {p: p.stat().st_mtime_ns for p in Path(stage.path).rglob("*")}
    again = tune(experiment, Display())
    assert "is finished already: trial" in capsys.readouterr().err
    assert again["best"] == result["best"]
    assert before == {p: p.stat().st_mtime_ns for p in Path(stage.path).rglob("*")}


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_equals_a_fine_tuning_run(ray_session, tmp_path):
    """The trial of the configured values gives the weights of `raybert finetune`."""
    experiment = searchable(tmp_path, tune={"trials": 1, "keep_models": True, "test": False})
    tune(experiment, QUIET)
    alone = stages.finetune(experiment, QUIET, in_process=True)
    one = huggingface.load_classifier(Folder(alone["model"]))[0].state_dict()
    trial = experiment.folder / "tune" / "trials" / "0000" / "model"
    other = huggingface.load_classifier(trial)[0].state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name])


@pytest.mark.ray
@pytest.mark.slow
def test_a_resumed_search_keeps_the_test_scores(ray_session, tmp_path, monkeypatch):
    experiment = searchable(tmp_path, tune={"trials": 1, "keep_models": True})
    result = tune(experiment, QUIET)
    (experiment.folder / "tune").delete("result.json")  # as if it was killed before it wrote it
    monkeypatch.setattr("raybert.pipeline.tune_result.evaluate_model", None)
    again = tune(experiment, QUIET)
    for key in ("trials", "best", "default", "test", "model", "run"):
        assert again[key] == result[key]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_over_input_lengths_prepares_the_texts_once(ray_session, tmp_path):
    space = {
        "finetune.seq_len": {"choice": [8, 16]},
        "finetune.head_share": {"uniform": [0.2, 0.9]},
        "finetune.head.pooling": {"choice": ["cls", "mean"]},
    }
    experiment = searchable(tmp_path, tune={"space": space, "searcher": "grid", "test": False})
    result = tune(experiment, QUIET)
    assert result["trials"]["finished"] == 1 + 2 * 3 * 2
    data = files(experiment.folder / "tune" / "data")
    assert data == {"train.parquet", "validation.parquet", "data.json"}
    kept = huggingface.read_preprocessing(Folder(result["model"]))
    values = result["best"]["config"]
    assert kept["seq_len"] == (values.get("finetune.seq_len") or 32)
    assert kept["head_tokens"] == round(kept["seq_len"] * values["finetune.head_share"])


@pytest.mark.ray
@pytest.mark.slow
def test_asha_stops_the_worse_trials_early(ray_session, tmp_path):
    experiment = searchable(
        tmp_path,
        finetune={"steps": 36, "evaluations": 4},
        tune={
            "trials": 9,
            "space": {"finetune.lr": {"log_uniform": [1e-7, 3e-2]}},
            "scheduler": {"kind": "asha", "grace_epochs": 1.0, "reduction": 2},
            "test": False,
        },
    )
    result = tune(experiment, QUIET)
    assert result["trials"]["stopped"] > 0
    assert result["trials"]["stopped"] + result["trials"]["finished"] == 9
    for trial in (experiment.folder / "tune").read_json("trials.json")["trials"]:
        assert (trial["epoch"] == 4.0) == (trial["state"] == "finished")
        assert (trial["why"] == f"stopped at epoch {trial['epoch']:g}") == (
            trial["state"] == "stopped"
        )


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_continues_after_a_trial_that_diverges(ray_session, tmp_path):
    space = {"finetune.lr": {"choice": [1e38, 2e-2]}}
    experiment = searchable(tmp_path, tune={"space": space, "searcher": "grid", "test": False})
    result = tune(experiment, QUIET)
    assert result["trials"] == {"all": 3, "finished": 2, "stopped": 0, "failed": 1}
    trials = (experiment.folder / "tune").read_json("trials.json")["trials"]
    [failed] = [t for t in trials if t["state"] == "failed"]
    assert failed["values"] == {"finetune.lr": 1e38}
    assert "are not finite" in failed["why"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_in_which_all_trials_fail_gives_the_reason(ray_session, tmp_path):
    experiment = searchable(
        tmp_path,
        finetune={"lr": 1e38},
        tune={"space": {"finetune.lr": {"choice": [9e37]}}, "searcher": "grid", "test": False},
    )
    with pytest.raises(RaybertError, match="no trial has a score: "):
        tune(experiment, QUIET)


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_continues_after_a_trial_that_runs_out_of_memory(ray_session, tmp_path):
    space = {"model.intermediate_size": {"choice": [2**46, 16]}}
    experiment = searchable(tmp_path, tune={"space": space, "searcher": "grid", "test": False})
    result = tune(experiment, QUIET)
    assert result["trials"] == {"all": 3, "finished": 2, "stopped": 0, "failed": 1}
    trials = (experiment.folder / "tune").read_json("trials.json")["trials"]
    [failed] = [t for t in trials if t["state"] == "failed"]
    assert failed["values"] == {"model.intermediate_size": 2**46}
    assert "memory" in failed["why"]


@contextmanager
def kill_a_worker(run):
    """Kill one trial's worker after the first evaluation of the trial in this folder."""
    killed = []

    def kill():
        ends = time.monotonic() + 120
        while not killed and time.monotonic() < ends:
            time.sleep(0.05)
            if any(r["kind"] == "eval" for r in read_metrics(run)):
                # Ray names a worker after its class, which Ray Tune's `with_parameters` wraps.
                names = ("ray::_Inner", "ray::FinetuneTrial")
                mine = psutil.Process().children(recursive=True)
                trials = [p for p in mine if " ".join(p.cmdline()).startswith(names)]
                for process in trials[:1]:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()
    assert killed


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_may_not_restart_fails_with_its_worker(ray_session, tmp_path):
    experiment = searchable(
        tmp_path,
        count=400,
        finetune={"steps": 1500, "evaluations": 10},
        tune={"trials": 2, "test": False, "max_failures": 0},
    )
    with kill_a_worker(experiment.folder / "tune" / "trials" / "0001"):
        result = tune(experiment, QUIET)
    assert result["trials"] == {"all": 2, "finished": 1, "stopped": 0, "failed": 1}
    trials = (experiment.folder / "tune").read_json("trials.json")["trials"]
    assert [t["why"] for t in trials if t["state"] == "failed"] == ["its worker was lost"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_on_an_object_store(ray_session, bucket, tmp_path):
    experiment = searchable(
        tmp_path,
        run={"name": "tiny", "storage": bucket.uri},
        finetune={"steps": 24, "evaluations": 6},
        tune={"trials": 3, "scheduler": {"kind": "pbt", "interval_epochs": 0.4}},
    )
    result = tune(experiment, QUIET)
    assert result["trials"]["failed"] == 0
    assert result["model"].startswith("s3://")
    assert result["test"]["n"] == 60
    registry = Registry(experiment.run.storage)
    registry.promote("reviews", Folder(result["model"]))
    assert huggingface.load_classifier(registry.current("reviews"))[1] == ["neg", "pos"]
    assert (experiment.folder / "tune").names("ray") == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_resumes_from_its_checkpoint_after_its_worker_is_lost(ray_session, tmp_path):
    experiment = searchable(
        tmp_path,
        count=400,
        finetune={"steps": 1500, "evaluations": 10, "checkpoint_steps": 50},
        tune={"trials": 2, "test": False},
    )
    with kill_a_worker(experiment.folder / "tune" / "trials" / "0001"):
        result = tune(experiment, QUIET)
    assert result["trials"] == {"all": 2, "finished": 2, "stopped": 0, "failed": 0}
    attempts = {
        name: len((experiment.folder / "tune" / "trials" / name / "attempts").names())
        for name in ("0000", "0001")
    }
    assert max(attempts.values()) > 1
    for name in attempts:
        steps = [r["step"] for r in read_metrics(experiment.folder / "tune" / "trials" / name)
                 if r["kind"] == "train"]  # fmt: skip
        assert steps == list(range(1, 1501))


@pytest.mark.ray
@pytest.mark.slow
def test_pbt_copies_weights_and_mutates_the_learning_rate(ray_session, tmp_path):
    experiment = searchable(
        tmp_path,
        finetune={"steps": 45, "evaluations": 10},
        tune={
            "trials": 4,
            "space": {"finetune.lr": {"log_uniform": [1e-7, 3e-2]}},
            "scheduler": {"kind": "pbt", "interval_epochs": 0.4},
            "test": False,
        },
    )
    stage = experiment.folder / "tune"
    result = tune(experiment, QUIET)
    assert result["trials"]["failed"] == 0
    trials = stage.read_json("trials.json")["trials"]
    exploits = [(trial, exploit) for trial in trials for exploit in trial["exchanges"]]
    assert exploits
    for trial, exploit in exploits:
        assert exploit["from"] != trial["trial"]
        assert exploit["weights_after"] == exploit["weights"]  # the donor's
        trained = exploit["trained"]
        assert trained["step"] == exploit["step"] + 1  # every step is logged
        assert trained["lr"] == trained["due"]
        share = (45 - exploit["step"]) / (45 - round(45 * 0.06))  # past the warm-up, linear
        assert trained["lr"] == pytest.approx(exploit["after"]["finetune.lr"] * share)
        low, high = 1e-7, 3e-2
        assert low <= exploit["after"]["finetune.lr"] <= high
    last = next(t for t in trials if t["exchanges"])
    assert last["values"] == last["exchanges"][-1]["after"]
    log = read_metrics(stage / "trials" / last["trial"])
    since = last["exchanges"][-1]["step"]
    rates = [r["lr"] for r in log if r["kind"] == "train" and r["step"] > since]
    assert rates and max(rates) <= last["values"]["finetune.lr"]
    report = stage.read_text("report.html")
    assert "Exchanges" in report and "NOT equal" not in report and "not logged" not in report


@pytest.mark.ray
@pytest.mark.slow
def test_hyperband_pauses_and_resumes_trials(ray_session, tmp_path):
    experiment = searchable(
        tmp_path,
        finetune={"steps": 81, "evaluations": 9},
        tune={
            "trials": 6,
            "space": {"finetune.lr": {"log_uniform": [1e-7, 3e-2]}},
            "scheduler": {"kind": "hyperband", "reduction": 3},
            "test": False,
        },
    )
    result = tune(experiment, QUIET)
    # The first bracket has 3 trials and stops none; the second has 5, and its best 2 continue
    # after epoch 3.
    assert result["trials"] == {"all": 6, "finished": 5, "stopped": 1, "failed": 0}
    trials = TrialStore(experiment.folder / "tune" / "trials").read_all()
    assert [e.epoch for e in trials if e.state == "finished"] == [9.0] * 5
    [stopped] = [e for e in trials if e.state == "stopped"]
    assert stopped.epoch == 3.0
    for other in trials[3:]:
        assert stopped.score <= max(e.score for e in other.evaluations if e.epoch <= 3.0)
    for name in (experiment.folder / "tune" / "trials").names():
        steps = [r["step"] for r in read_metrics(experiment.folder / "tune" / "trials" / name)
                 if r["kind"] == "train"]  # fmt: skip
        assert steps == list(range(1, len(steps) + 1))  # no step twice, none left out


@pytest.mark.ray
@pytest.mark.slow
def test_trials_of_several_workers(ray_session, tmp_path):
    experiment = searchable(
        tmp_path, finetune={"workers": 2}, tune={"trials": 2, "test": False, "finalists": 1}
    )
    result = tune(experiment, QUIET)
    assert result["trials"]["finished"] == 2
    log = read_metrics(experiment.folder / "tune" / "trials" / "0001")
    [start] = [r for r in log if r.get("event") == "start"]
    assert start["workers"] == 2


@pytest.mark.ray
@pytest.mark.slow
def test_the_time_limit_ends_the_search(ray_session, tmp_path, monkeypatch):
    experiment = searchable(
        tmp_path,
        finetune={"steps": 3000, "evaluations": 300},
        tune={"trials": 50, "minutes": 0.4, "test": False},
    )

    class SearchEnded(Exception):
        pass

    def stop(search, trials):
        raise SearchEnded  # finalists have no time limit

    monkeypatch.setattr("raybert.pipeline.tune_stage.Search._run_finalists", stop)
    with pytest.raises(SearchEnded):
        tune(experiment, QUIET)
    trials = TrialStore(experiment.folder / "tune" / "trials").read_all()
    assert 0 < len(trials) < 50
    assert {e.state for e in trials} <= {"stopped", "finished"}
    assert any(e.reason == "time limit reached" for e in trials)
    assert (experiment.folder / "tune").read_json("search.json")["seconds"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_and_killed_search_resumes_without_repeating_trials(tmp_path):
    experiment = searchable(
        tmp_path,
        count=400,
        finetune={"steps": 600, "evaluations": 4, "checkpoint_steps": 25},
        tune={"trials": 5, "concurrency": 1, "test": False},
    )
    config = tmp_path / "search.yaml"
    config.write_text(experiment.model_dump_json())  # JSON is YAML
    stage = Path((experiment.folder / "tune").path)
    command = [sys.executable, "-m", "raybert", "tune", "-c", str(config), "--json"]

    def start():
        return subprocess.Popen(
            command, stdout=-1, stderr=-1, text=True, start_new_session=True, cwd=tmp_path
        )

    def ended():
        """The number of attempts of each trial that has ended."""
        return {
            path.parent.name: len(list((path.parent / "attempts").iterdir()))
            for path in stage.glob("trials/*/result.json")
        }

    def wait_for(trial):
        """Wait until a trial has its first checkpoint."""
        ends = time.monotonic() + 180
        while not list((stage / "trials" / trial / "checkpoints").glob("step-*.json")):
            assert time.monotonic() < ends
            time.sleep(0.02)

    process = start()
    wait_for("0001")
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted; run the same command again" in err
    before = [ended()]

    process = start()
    wait_for("0003")
    before.append(ended())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["trials"] == {"all": 5, "finished": 5, "stopped": 0, "failed": 0}
    trials = {e.name: e for e in TrialStore(experiment.folder / "tune" / "trials").read_all()}
    assert sorted(trials) == ["0000", "0001", "0002", "0003", "0004"]
    attempts = ended()
    for known in before:
        assert known and known.items() <= attempts.items()  # none of them was restarted
    assert attempts["0001"] > 1 and attempts["0003"] > 1
    for name in trials:
        steps = [r["step"] for r in read_metrics(experiment.folder / "tune" / "trials" / name)
                 if r["kind"] == "train"]  # fmt: skip
        assert steps == list(range(1, 601))
