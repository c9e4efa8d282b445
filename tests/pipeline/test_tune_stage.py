"""The end of a search: files are written in an order in which a kill loses nothing."""

from types import SimpleNamespace

import pytest
from making import searchable

from raybert.config import dump
from raybert.pipeline.tune_result import Cost, finish_search
from raybert.pipeline.tune_stage import tune
from raybert.storage.folder import Folder
from raybert.terminal.display import Display
from raybert.train.run_folder import CONFIG, RESULT
from raybert.tune.finalists import Finalist
from raybert.tune.space import Space
from raybert.tune.trial_store import Evaluation, TrialRecord


class Killed(BaseException):
    pass


def trial(name, score):
    return TrialRecord(name, {"finetune.lr": score}, 0, "finished", started=1.0, ended=2.0,
                 evaluations=[Evaluation(1, 1.0, score, score, 0.5, 2.0)])  # fmt: skip


@pytest.fixture
def search(tmp_path):
    """A search whose trials and finalists' runs have ended."""
    experiment = searchable(tmp_path, tune={"test": False})
    stage = experiment.folder / "tune"
    stage.write_text(CONFIG, dump(experiment))
    trials = [trial("0000", 0.5), trial("0001", 0.75)]
    finalists = [Finalist(t, [trial(f"{t.name}-s1", t.score)]) for t in reversed(trials)]
    models = [f"trials/{t.name}/model" for t in trials]
    models += [f"seeds/{f.trial.name}-s1/model" for f in finalists]
    for model in models:
        stage.write_text(f"{model}/config.json", model)

    def finish():
        return finish_search(
            experiment,
            Display(quiet=True),
            Space.parse(experiment.tune.space),
            trials,
            finalists,
            cost=Cost(0.0, 0.0, 0.0),
            seconds=1.0,
            seen_in_training=False,
        )

    return SimpleNamespace(experiment=experiment, stage=stage, models=models, finish=finish)


def remaining_models(search):
    return [model for model in search.models if search.stage.exists(f"{model}/config.json")]


@pytest.mark.parametrize(
    "where", ["raybert.report.write_report", "raybert.pipeline.tune_result.importance"]
)
def test_a_search_that_is_killed_at_its_end_finishes_when_it_is_run_again(
    search, monkeypatch, where
):
    def kill(*args):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(where, kill)
        search.finish()
    assert not search.stage.exists(RESULT)  # else it would count as finished
    assert remaining_models(search) == search.models  # the winner's is copied again
    result = search.finish()
    assert search.stage.exists("report.html") and result["report"].endswith("report.html")
    assert search.stage.read_json(RESULT) == result
    assert search.stage.read_text("model/config.json") == "seeds/0001-s1/model"
    assert remaining_models(search) == []


def test_the_other_models_are_deleted_only_after_the_result_is_written(search, monkeypatch):
    delete = Folder.delete

    def kill(folder, name):
        if name == "model":
            raise Killed
        delete(folder, name)

    monkeypatch.setattr(Folder, "delete", kill)
    with pytest.raises(Killed):
        search.finish()
    assert search.stage.read_json(RESULT)["report"].endswith("report.html")


def test_the_report_shows_the_result_that_is_written_after_it(search):
    search.finish()
    report = search.stage.read_text("report.html")
    assert "no result" not in report and "0.7500" in report


@pytest.mark.parametrize("left", [{}, {"report": None}])
def test_a_finished_search_without_a_report_writes_it_when_it_is_run_again(search, left):
    """An earlier version wrote the result first, and could be killed before the report."""
    result = search.finish()
    del result["report"]
    search.stage.delete("report.html")
    search.stage.write_json(RESULT, {**result, **left})
    again = tune(search.experiment, Display(quiet=True))
    assert search.stage.exists("report.html")
    assert again == search.stage.read_json(RESULT)
    assert again == {**result, "report": (search.stage / "report.html").uri}
