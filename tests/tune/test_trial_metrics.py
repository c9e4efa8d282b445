"""Searches of any task: trials are ranked by score, and shown with the metric in its own unit."""

import json

import pytest
from made import TASKS as MADE
from making import searchable

from raybert.cli.stage_commands import _format_search
from raybert.config import build
from raybert.errors import ConfigError
from raybert.pipeline import runs
from raybert.pipeline.tune_result import Cost, format_best, search_result
from raybert.pipeline.tune_stage import tune
from raybert.storage.folder import Folder
from raybert.tasks.registry import TASKS
from raybert.terminal.display import Display
from raybert.tune.finalists import Finalist, is_better, rank_finalists
from raybert.tune.settings import DEFAULT_SPACE, TrialConfig, TuneConfig
from raybert.tune.space_checks import read_space, task_space
from raybert.tune.tensorboard import EventWriter
from raybert.tune.trial_store import Evaluation, TrialRecord, rank_trials
from raybert.tune.trial_table import format_end, format_progress


def evaluation(rmse, step=1):
    record = {"step": step, "epoch": 1.0, "score": -rmse, "metric": "rmse", "rmse": rmse, "loss": 1}
    return Evaluation.from_record(record)


def trial(name, *values, **more):
    evaluations = [evaluation(value, step) for step, value in enumerate(values, 1)]
    given = {"evaluations": evaluations, "started": 1.0, "ended": 2.0, "state": "finished", **more}
    return TrialRecord(name, {"k": name}, 0, **given)


TRIALS = [trial("0000", 250.0, 120.0), trial("0001", 90.0, 110.0), trial("0002", 300.0)]


def test_a_record_without_a_metric_is_of_the_accuracy():
    found = Evaluation.from_record(
        {"step": 1, "epoch": 1, "score": 0.4, "accuracy": 0.5, "loss": 1}
    )
    assert (found.metric, found.value) == ("accuracy", 0.5)


def test_the_lowest_error_is_the_best_and_shown_as_it_is():
    assert [t.name for t in rank_trials(TRIALS)] == ["0001", "0000", "0002"]
    assert TRIALS[1].best.value == 90.0
    assert format_progress(TRIALS, 3).endswith("best 90.0000 (0001)")
    assert "rmse 90.0000" in format_end(TRIALS[1])
    shown = json.loads(json.dumps(TRIALS[1].as_json("rmse")))
    assert (shown["metric"], shown["rmse"], shown["score"]) == ("rmse", 90.0, -90.0)
    assert "accuracy" not in shown
    assert trial("0003").as_json("rmse")["rmse"] is None


def runs_of(name, *values):
    return [trial(f"{name}-s{n}", value) for n, value in enumerate(values, 1)]


def test_finalists_and_the_result_name_the_metric():
    finalists = rank_finalists(
        TRIALS[:2], [*runs_of("0000", 120.0, 122.0), *runs_of("0001", 90.0, 92.0)], 10**6
    )
    result = search_result(TRIALS, finalists, Cost(0.0, 0.0, 0.0), 1.0)
    best = result["best"]
    assert (best["trial"], best["metric"], best["seeds"]["rmse"]["mean"]) == ("0001", "rmse", 91.0)
    assert result["default"]["seeds"]["rmse"]["mean"] == 121.0
    result["test"] = {"metric": "rmse", "rmse": 95.5, "n": 9}
    line = format_best(result)
    assert line.startswith(
        "trial 0001, validation rmse 91.0000 ± 1.4142, the configured values 121"
    )
    assert "test rmse 95.5000" in line
    shown = _format_search({**result, "model": "m", "config": "c"})
    assert "validation rmse" in shown and "95.5000 (9 texts)" in shown


@pytest.mark.parametrize(("texts", "wins"), [(10**6, True), (20, False)])
def test_an_error_has_a_standard_error_of_the_validation_texts(texts, wins):
    """An error of 100 on 20 texts is known to 100 / sqrt(40), about 16."""
    configured, other = (
        Finalist(trial(name, value), runs_of(name, value, value))
        for name, value in (("0000", 100.0), ("0001", 90.0))
    )
    assert is_better(other, configured, texts) is wins


def test_curves_are_named_by_the_metric(tmp_path):
    pytest.importorskip("tensorboardX")
    written = {}

    class Writer:
        def add_scalar(self, key, value, step):
            written[key] = value

        def flush(self):
            pass

    writer = EventWriter(Folder(tmp_path))
    writer._writers["0001"] = Writer()
    writer.on_evaluation(TRIALS[1])
    assert written["validation/rmse"] == 110.0
    assert "validation/accuracy" not in written


# The space ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_default_space_has_the_keys_that_a_task_uses(name):
    task = TASKS[name]
    found = task_space(DEFAULT_SPACE, task)
    assert not set(found) & task.unused_settings
    assert task.search_space.items() <= found.items()
    common = {k for k in DEFAULT_SPACE if k not in task.unused_settings}
    assert common <= set(found)
    base = TrialConfig()
    assert len(read_space(TuneConfig(), base, task)) == len(found)


def test_the_default_space_of_single_labels_is_as_before():
    """The order of the keys decides what is drawn."""
    found = task_space(DEFAULT_SPACE, TASKS["single_label"])
    assert list(found.items()) == list(DEFAULT_SPACE.items())


def test_a_range_of_a_key_without_effect_is_refused():
    space = {"finetune.label_smoothing": {"uniform": [0, 0.2]}, "finetune.lr": {"uniform": [0, 1]}}
    assert task_space(space, TASKS["multi_label"]) == space
    with pytest.raises(ConfigError, match=r"finetune.label_smoothing has no effect on regression"):
        task_space(space, TASKS["regression"])


@pytest.mark.parametrize("key", ["task", "metric", "validation_split"])
def test_what_trials_are_compared_on_can_not_be_searched(key):
    config = build(TuneConfig, {"space": {f"finetune.{key}": {"choice": ["a", "b"]}}}, "test")
    with pytest.raises(ConfigError, match=f"finetune.{key} can't be searched"):
        read_space(config, TrialConfig())


# Whole searches ----------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_every_task_can_be_searched(ray_session, tmp_path, name):
    experiment = searchable(tmp_path, made=name, tune={"trials": 3, "finalists": 1, "seeds": 2})
    result = tune(experiment, Display(quiet=True))
    metric = result["best"]["metric"]
    assert metric == MADE[name](4).metric or metric == "rmse"
    assert result["trials"]["finished"] == 3
    assert result["best"]["seeds"][metric]["mean"] is not None
    assert result["test"][metric] is not None
    shown = (experiment.folder / "tune").read_json("trials.json")
    assert shown["metric"] == metric
    best = max(shown["trials"], key=lambda t: t["score"])
    pick = min if best["score"] < 0 else max
    assert best[metric] == pytest.approx(pick(t[metric] for t in shown["trials"]), rel=1e-3)
    assert (experiment.folder / "tune").exists("report.html")
    [run] = runs.list_runs(Folder(tmp_path / "runs"))
    figures = next(stage.figures for stage in run.stages if stage.name == "tune")
    assert figures[metric] == result["best"]["seeds"][metric]["mean"]
    assert figures[f"test_{metric}"] == result["test"][metric]
