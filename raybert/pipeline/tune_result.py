"""The end of a search: the winner's model, its test scores, the report and the result.

The result is written last. A session that is killed before that repeats these steps when it is
resumed; only then are the other models deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybert.config import dump
from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.pipeline.stages import METRICS, evaluate_model, stored_metrics
from raybert.storage.folder import Folder
from raybert.terminal.display import Display
from raybert.terminal.formats import clock
from raybert.train.run_folder import RESULT
from raybert.tune.finalists import Finalist
from raybert.tune.settings import TrialConfig
from raybert.tune.space import Space
from raybert.tune.summary import Cost, search_result, write_trials
from raybert.tune.trial_store import TrialRecord

WINNER = "winner.yaml"


def finish_search(
    experiment: Experiment,
    display: Display,
    stage: Folder,
    space: Space,
    trials: Sequence[TrialRecord],
    finalists: Sequence[Finalist],
    *,
    cost: Cost,
    seconds: float,
    seen_in_training: bool,
) -> dict[str, Any]:
    """Write the winner's model, measure it on the test texts, write the report and the result.

    The first of the finalists is the winner; `seen_in_training` are test texts that trials read.
    """
    config = experiment.tune
    run = finalists[0].best_run()
    (stage / "seeds" / run.name / "model").copy_to(stage / "model", last="config.json")
    base = TrialConfig(model=experiment.model, finetune=experiment.finetune)
    won = base.with_values({**run.values, "finetune.seed": run.seed})
    winner = experiment.model_copy(update={"model": won.model, "finetune": won.finetune})
    stage.write_text(WINNER, dump(winner))
    write_trials(stage, space, trials, finalists, cost, config.scheduler.kind, config.searcher)
    result = search_result(trials, finalists, cost, seconds)
    result |= {"model": (stage / "model").uri, "config": (stage / WINNER).uri, "run": run.name}
    if config.test:
        metrics = stored_metrics(experiment, stage)  # by a session that was killed afterwards
        if metrics is None:
            metrics = evaluate_model(experiment, stage / "model", display)
            stage.write_json(METRICS, metrics)
        result["test"] = {key: metrics[key] for key in ("accuracy", "loss", "f1_macro", "n")}
        result["test"]["seen_in_training"] = seen_in_training
    stage.delete("ray")  # left by sessions that were killed
    result = write_report_and_result(stage, result, display)
    if not config.keep_models:
        runs = [run for finalist in finalists for run in finalist.runs]
        for folder, records in (("trials", trials), ("seeds", runs)):
            for record in records:
                (stage / folder / record.name).delete("model")
    display.print(f"tune      {format_best(result)}; model in {result['model']}")
    return result


def write_report_and_result(
    stage: Folder, result: dict[str, Any], display: Display
) -> dict[str, Any]:
    """Write the report, then the result, with which a search is finished; returns the result."""
    from raybert.report import write_report

    result = {**result, "report": None}
    try:
        write_report(stage, result)
        result["report"] = (stage / "report.html").uri
    except UserError as error:  # the result is complete without it
        display.print(f"report    none: {error}")
    stage.write_json(RESULT, result)
    return result


def format_best(result: dict[str, Any]) -> str:
    """The winner's scores beside those of the configured values, in a line."""
    best, default = result["best"]["seeds"]["accuracy"], result["default"]
    parts = [f"trial {result['best']['trial']}, validation accuracy {_format_spread(best)}"]
    if default is not None:
        parts.append(f"the configured values {_format_spread(default['seeds']['accuracy'])}")
    if "test" in result:
        parts.append(f"test accuracy {result['test']['accuracy']:.4f}")
    return f"{', '.join(parts)}, in {clock(result['seconds'])}"


def _format_spread(spread: dict[str, Any]) -> str:
    if spread["mean"] is None:
        return "none"
    return f"{spread['mean']:.4f}" + ("" if spread["std"] is None else f" ± {spread['std']:.4f}")
