"""`raybert finetune --folds`: every text is validated on once, and finished folds are kept."""

import json
import statistics

import pytest
from commands import refused
from made import TASKS
from making import GOOD, NEUTRAL, searchable

from raybert.config import build
from raybert.errors import ConfigError, DataError
from raybert.experiment import Experiment
from raybert.pipeline import runs
from raybert.pipeline.folds_stage import finetune_folds, format_folds
from raybert.storage.folder import Folder
from raybert.tasks.prepared_texts import read_prepared_texts
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.terminal.display import Display

QUIET = Display(quiet=True)


def run(experiment, folds):
    return finetune_folds(experiment, QUIET, folds, in_process=True)


def validated(experiment, folds):
    """The token ids of the texts that each fold validates on."""
    found = []
    for number in range(1, folds + 1):
        data = experiment.folder / "folds" / f"{number}-of-{folds}" / "data"
        texts = TokenizedTexts.load(data, read_prepared_texts(data).validation)
        seconds = texts.seconds or [()] * len(texts.input_ids)
        found.append([(*a.tolist(), -1, *b) for a, b in zip(texts.input_ids, seconds, strict=True)])
    return found


@pytest.mark.parametrize("name", TASKS)
def test_every_text_is_validated_on_once(tmp_path, name):
    experiment = searchable(tmp_path, made=name, count=90, finetune={"steps": 2, "evaluations": 1})
    result = run(experiment, 3)
    metric = result["metric"]
    values = [fold[metric] for fold in result["folds"]]
    assert result["mean"] == pytest.approx(statistics.fmean(values))
    assert result["std"] == pytest.approx(statistics.stdev(values))
    parts = validated(experiment, 3)
    assert [fold["n"] for fold in result["folds"]] == [len(part) for part in parts]
    assert sum(map(len, parts)) == 90
    for text in parts[0]:
        assert text not in parts[1] and text not in parts[2]
    assert all(Folder(fold["model"]).exists("config.json") for fold in result["folds"])
    assert f"{metric} {result['mean']:.4f}" in format_folds(result)
    [stage] = [s for r in runs.list_runs(Folder(tmp_path / "runs")) for s in r.stages if s.figures]
    assert (stage.name, stage.figures) == ("folds", {"folds": 3, metric: result["mean"]})


def test_finished_folds_are_kept(tmp_path):
    experiment = searchable(tmp_path, finetune={"steps": 2, "evaluations": 1})
    result = run(experiment, 3)
    stage = experiment.folder / "folds"
    assert run(experiment, 3) == result
    for name in ("result.json", "2-of-3/result.json"):
        stage.delete(name)
    [listed] = [s for r in runs.list_runs(Folder(tmp_path / "runs")) for s in r.stages[1:]]
    assert (listed.state, listed.figures) == ("begun", {"folds": 2})
    again = run(experiment, 3)
    assert again["folds"] == result["folds"]
    attempts = [len((stage / f"{n}-of-3" / "attempts").names()) for n in (1, 2, 3)]
    assert attempts == [1, 2, 1]
    assert len(run(experiment, 2)["folds"]) == 2  # another number of folds
    assert run(experiment, 3)["folds"] == result["folds"]
    assert attempts == [len((stage / f"{n}-of-3" / "attempts").names()) for n in (1, 2, 3)]


def test_folds_keep_groups_together(tmp_path):
    experiment = searchable(tmp_path, finetune={"steps": 1, "evaluations": 1})
    names = [*NEUTRAL, *GOOD]
    rows = [
        {
            "text": f"a film {names[group]} {names[copy]}",
            "label": ("neg", "pos")[group % 2],
            "author": group,
        }
        for group in range(12)
        for copy in range(3)
    ]
    path = tmp_path / "grouped.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = json.loads(experiment.model_dump_json())
    values["finetune"]["source"] |= {"path": str(path), "group_column": "author"}
    result = run(build(Experiment, values, "test"), 3)
    assert [fold["n"] % 3 for fold in result["folds"]] == [0, 0, 0]
    assert sum(fold["n"] for fold in result["folds"]) == 36


def test_settings_that_changed_are_refused(tmp_path):
    experiment = searchable(tmp_path, finetune={"steps": 2, "evaluations": 1})
    run(experiment, 2)
    changed = searchable(tmp_path, finetune={"steps": 2, "evaluations": 1, "lr": 0.5})
    for folds in (2, 3):
        with pytest.raises(ConfigError, match="with other settings"):
            run(changed, folds)


def test_mistakes_are_one_line(tmp_path, raybert):
    validation = {"path": str(tmp_path / "test.csv")}
    experiment = searchable(tmp_path, finetune={"validation": validation})
    with pytest.raises(ConfigError, match="finetune.validation names texts to validate on"):
        run(experiment, 2)
    assert not experiment.folder.exists("folds")
    few = searchable(tmp_path / "few", count=4)
    with pytest.raises(DataError, match="--folds=9: part 5 has 0 of the 4 labelled texts"):
        run(few, 9)
    assert refused(raybert("finetune", "--seeds", 2, "--folds", 2)).startswith("--seeds trains on")


def test_a_command_prints_each_fold(tmp_path, raybert):
    experiment = searchable(tmp_path, finetune={"steps": 2, "evaluations": 1})
    (tmp_path / "tiny.yaml").write_text(experiment.model_dump_json())
    at = ("finetune", "-c", tmp_path / "tiny.yaml", "--folds", 2, "--bare")
    shown = raybert(*at)
    assert shown.code == 0, shown.err
    head, first, second, mean = shown.out.splitlines()
    assert head.split() == ["fold", "accuracy", "loss", "texts"]
    assert [first.split()[0], second.split()[0]] == ["1", "2"]
    found = raybert(*at, "--json").json
    assert mean == f"accuracy {found['mean']:.4f} ± {found['std']:.4f} over 2 folds"
    assert first.split()[1] == f"{found['folds'][0]['accuracy']:.4f}"
