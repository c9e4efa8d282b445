"""Reports and printed scores of every task: its metric, its tables, and no empty plot."""

import json

import pytest
from made import TASKS, measured_run

from raybert.cli.stage_commands import _format_scores
from raybert.report import write_report
from raybert.report.elements import format_metric, metric_name
from raybert.storage.folder import Folder
from raybert.tasks.registry import tables_of

TITLES = {
    "single_label": "Scores per class",
    "pairs": "Scores per class",
    "multi_label": "Scores per label",
    "regression": "Scores per target",
    "token_classification": "Entities per type",
}


@pytest.fixture(scope="module", params=TASKS)
def measured(request, tmp_path_factory):
    return request.param, measured_run(Folder(tmp_path_factory.mktemp("run")), request.param)


def test_a_report_has_the_metric_and_the_tables_of_the_task(measured):
    name, run = measured
    write_report(run)
    page, metrics = run.read_text("report.html"), run.read_json("metrics.json")
    assert TITLES[name] in page
    metric = metrics["metric"]
    assert f"<small>{metric_name(metric, begins=True)}</small>" in page
    assert f"<b>{format_metric(metric, metrics[metric])}</b>" in page
    assert f"Validation {metric_name(metric)}</small>" in page
    assert "Validation score" in page
    for row in tables_of(metrics)[0].rows:
        assert f'<th scope="row">{row[0]}</th>' in page
    assert ("Confusion matrix" in page) == ("confusion" in metrics)
    for example in metrics["examples"][:1]:
        assert f"in truth <b>{example['label']}</b>" in page or "probability" in example
    assert ("Largest errors" in page) == (name == "regression")


def test_the_best_evaluation_is_the_one_with_the_best_score(measured):
    name, run = measured
    evaluations = [
        record
        for path in run.names("metrics")
        for line in (run / "metrics").read_text(path).splitlines()
        if (record := json.loads(line)).get("kind") == "eval"
    ] or [r for r in map(json.loads, run.read_text("metrics.jsonl").splitlines())
          if r.get("kind") == "eval"]  # fmt: skip
    metric = evaluations[0]["metric"]
    best = max(evaluations, key=lambda record: record["score"])
    write_report(run)
    page = run.read_text("report.html")
    tile = page[page.index(f"<small>Validation {metric_name(metric)}</small>") :]
    assert tile[: tile.index("</b>")].endswith(format_metric(metric, best[metric]))


def test_printed_scores_are_those_of_the_task(measured):
    name, run = measured
    metrics = run.read_json("metrics.json")
    lines = _format_scores(metrics).splitlines()
    metric = metrics["metric"]
    assert lines[0].split() == [metric, f"{metrics[metric]:.4f}"]
    assert lines[1].split() == ["loss", f"{metrics['loss']:.4f}"]
    assert not any("texts_per_second" in line for line in lines)
    for table in tables_of(metrics):
        for row in table.rows:
            assert any(line.split() == " ".join(row).split() for line in lines)
    assert any("label \\ predicted" in line for line in lines) == ("confusion" in metrics)


def test_scores_of_a_task_that_is_not_registered_are_shown_without_tables(measured):
    name, run = measured
    metrics = {**run.read_json("metrics.json"), "task": "of another program"}
    assert tables_of(metrics) == []
    assert _format_scores(metrics).startswith(metrics["metric"])


def search_of(metric, values, sign):
    def trial(name, value):
        spread = {"mean": value, "std": 0.5, "values": [value, value]}
        return {
            "trial": name, "state": "finished", "why": "", "score": sign * value, "metric": metric,
            metric: value, "loss": 0.5, "values": {"finetune.lr": 1e-3, "finetune.epochs": 2},
            "seed": 0, "epoch": 1.0, "begun": 1e9, "ended": 1e9 + 90, "seconds": 61.0,
            "evaluations": [[1.0, sign * value, value, 1e9 + 60 * value]], "exchanges": [],
            "config": {"finetune.lr": 1e-3}, "configured": False,
            "seeds": {"n": 2, "score": spread, metric: spread, "loss": spread},
        }  # fmt: skip

    trials = [trial(f"{n:04d}", value) for n, value in enumerate(values)]
    return {
        "searcher": "tpe", "scheduler": "asha", "metric": metric, "trials": trials,
        "dimensions": [
            {"key": "finetune.lr", "kind": "log_uniform", "low": 1e-4, "high": 1e-1},
            {"key": "finetune.epochs", "kind": "integer", "low": 1, "high": 3},
        ],
        "finalists": trials[:2], "importance": {"method": "m", "shares": {"finetune.lr": 0.5}},
        "cost": {"core_hours": 1.0},
    }  # fmt: skip


@pytest.mark.parametrize(("metric", "sign"), [("rmse", -1), ("f1_micro", 1), ("loss", -1)])
def test_a_search_is_ranked_by_score_and_shows_the_metric(tmp_path, metric, sign):
    folder = Folder(tmp_path) / "tune"
    folder.write_json("trials.json", search_of(metric, [12.5, 11.25, 13.75], sign))
    write_report(Folder(tmp_path))
    page = (Folder(tmp_path)).read_text("report.html")
    assert f"Validation {metric_name(metric)} over time" in page
    assert page.count("<svg") == 4
    table = page[page.index("All trials") :]
    shown = [v for v in ("12.5000", "11.2500", "13.7500") if v in table]
    by_place = sorted(shown, key=table.index)
    assert by_place == sorted(shown, key=float, reverse=sign > 0)


def test_folds_have_a_table(tmp_path):
    folds = [{"fold": n, "metric": "rmse", "rmse": 1.5 * n, "loss": 0.5, "n": 9} for n in (1, 2)]
    result = {"metric": "rmse", "mean": 2.25, "std": 1.06, "folds": folds, "seconds": 3.0}
    (Folder(tmp_path) / "folds").write_json("result.json", result)
    write_report(Folder(tmp_path))
    page = Folder(tmp_path).read_text("report.html")
    assert "Each fold" in page and "<th>RMSE</th>" in page and "2.25" in page
