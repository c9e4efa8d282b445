"""The end of a search: files are written in an order in which a kill loses nothing."""

from types import SimpleNamespace

import pytest
from making import reviews, searchable, tokenizer_of

from raybert.config import dump
from raybert.inference.classifier import TextClassifier
from raybert.pipeline import baseline_stage
from raybert.pipeline.tune_result import Cost, finish_search
from raybert.pipeline.tune_stage import tune
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec
from raybert.tasks.prepared_texts import prepare_texts
from raybert.terminal.display import Display
from raybert.train.run import train_in_process
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
    experiment = searchable(tmp_path, tune={"test": False}, finetune={"ngrams": "on"})
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


def test_the_winner_gets_n_grams_beside_its_encoder(search):
    experiment, stage, quiet = search.experiment, search.stage, Display(quiet=True)
    tokenizer = tokenizer_of([text for text, _ in reviews(160)])
    tokenizer.save(experiment.folder / "corpus")

    fit = baseline_stage.fitter(experiment, quiet, stage / "baseline")
    config = experiment.finetune
    prepared = prepare_texts(config, tokenizer, 1 << 20, 0, stage / "data", fit_baseline=fit)
    prepared = prepared.model_copy(update={"seq_len": 32, "head_tokens": 8})
    corpus, data = experiment.folder / "corpus", stage / "data"
    spec = FinetuneSpec(config, experiment.model, None, corpus, data, prepared)
    train_in_process(spec, stage / "seeds/0001-s1", on_progress=lambda record: None)
    search.finish()
    assert TextClassifier(stage / "model").ngrams is not None
