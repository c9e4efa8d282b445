"""The end of a search: what is written in which order, so that a kill loses nothing."""

from types import SimpleNamespace

import pytest
from making import searchable

from raybert.config import dump
from raybert.pipeline.tune_stage import _Tuning, tune
from raybert.storage.folder import Folder
from raybert.terminal.display import Display
from raybert.train.run import CONFIG, RESULT
from raybert.tune.finalists import Finalist
from raybert.tune.space import Space
from raybert.tune.trial_store import Evaluation, TrialRecord


class Killed(BaseException):
    pass


def entry(name, score):
    return TrialRecord(name, {"finetune.lr": score}, 0, "finished", begun=1.0, ended=2.0,
                 evaluations=[Evaluation(1, 1.0, score, score, 0.5, 2.0)])  # fmt: skip


@pytest.fixture
def search(tmp_path):
    """A search whose trials and finalists' runs are all over."""
    experiment = searchable(tmp_path, tune={"test": False})
    stage = experiment.folder / "tune"
    stage.write_text(CONFIG, dump(experiment))
    entries = [entry("0000", 0.5), entry("0001", 0.75)]
    finalists = [Finalist(e, [entry(f"{e.name}-s1", e.score)]) for e in reversed(entries)]
    models = [f"trials/{e.name}/model" for e in entries]
    models += [f"seeds/{f.trial.name}-s1/model" for f in finalists]
    for model in models:
        stage.write_text(f"{model}/config.json", model)
    session = SimpleNamespace(
        _stage=stage,
        _config=experiment.tune,
        _display=Display(quiet=True),
        _runner=SimpleNamespace(cores=1.0, gpus=0.0),
        _space=Space.parse(experiment.tune.space),
        _winning=lambda run: experiment,
    )

    def finish():
        return _Tuning._finish(session, entries, finalists, 1.0)

    return SimpleNamespace(experiment=experiment, stage=stage, models=models, finish=finish)


def there(search):
    return [model for model in search.models if search.stage.exists(f"{model}/config.json")]


@pytest.mark.parametrize(
    "where", ["raybert.report.write_report", "raybert.pipeline.tune_stage.write_trials"]
)
def test_a_search_that_is_killed_at_its_end_comes_to_its_end_when_run_again(
    search, monkeypatch, where
):
    def kill(*args):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(where, kill)
        search.finish()
    assert not search.stage.exists(RESULT)  # or it would count as finished
    assert there(search) == search.models  # of which the winner's is copied again
    result = search.finish()
    assert search.stage.exists("report.html") and result["report"].endswith("report.html")
    assert search.stage.read_json(RESULT) == result
    assert search.stage.read_text("model/config.json") == "seeds/0001-s1/model"
    assert there(search) == []


def test_the_losers_models_go_only_when_the_result_stands(search, monkeypatch):
    delete = Folder.delete

    def kill(folder, name):
        if name == "model":
            raise Killed
        delete(folder, name)

    monkeypatch.setattr(Folder, "delete", kill)
    with pytest.raises(Killed):
        search.finish()
    assert search.stage.read_json(RESULT)["report"].endswith("report.html")


def test_the_report_tells_the_result_that_is_written_after_it(search):
    search.finish()
    report = search.stage.read_text("report.html")
    assert "no result" not in report and "0.7500" in report


@pytest.mark.parametrize("left", [{}, {"report": None}])
def test_a_finished_search_without_a_report_makes_it_when_run_again(search, left):
    """As one is that was killed between the two by an earlier version."""
    result = search.finish()
    del result["report"]
    search.stage.delete("report.html")
    search.stage.write_json(RESULT, {**result, **left})
    again = tune(search.experiment, Display(quiet=True))
    assert search.stage.exists("report.html")
    assert again == search.stage.read_json(RESULT)
    assert again == {**result, "report": (search.stage / "report.html").uri}
