"""The end of a search: the winner's model, its test scores, the report and the result.

The result is written last. A session that is killed before that repeats these steps when it is
resumed; only then are the other models deleted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raybert.config import dump
from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.pipeline.ngrams_stage import add_ngrams
from raybert.pipeline.stages import METRICS, evaluate_model, stored_metrics
from raybert.records import finite, headline, metric_of
from raybert.storage.folder import Folder
from raybert.terminal.display import Display
from raybert.terminal.formats import clock, mean_and_deviation
from raybert.train.run_folder import RESULT
from raybert.tune.finalists import Finalist, configured_trial
from raybert.tune.importance import METHOD, importance
from raybert.tune.settings import TrialConfig
from raybert.tune.space import Space
from raybert.tune.trial_store import TrialRecord, count_states

WINNER = "winner.yaml"
TRIALS, CLOCK = "trials.json", "search.json"


class SearchClock:
    """The seconds of a search over all its sessions; stored whenever a trial ends."""

    def __init__(self, stage: Folder) -> None:
        found = stage.read_json(CLOCK)["seconds"] if stage.exists(CLOCK) else 0.0
        self.earlier = float(found)  # seconds of earlier sessions
        self._stage, self._started = stage, time.monotonic()

    @property
    def seconds(self) -> float:
        """The seconds of all sessions so far."""
        return self.earlier + time.monotonic() - self._started

    def write(self) -> None:
        """Store the seconds."""
        self._stage.write_json(CLOCK, {"seconds": round(self.seconds, 1)})


@dataclass(frozen=True)
class Cost:
    """The compute that trials used."""

    trial_seconds: float
    core_hours: float
    gpu_hours: float

    @classmethod
    def of(cls, trials: Sequence[TrialRecord], cores: float, gpus: float) -> Cost:
        """Sum the trials' training seconds, times the cores and GPUs of each trial."""
        seconds = sum(trial.seconds for trial in trials)
        hours = seconds / 3600
        return cls(round(seconds, 1), round(hours * cores, 4), round(hours * gpus, 4))


def finish_search(
    experiment: Experiment,
    display: Display,
    space: Space,
    trials: Sequence[TrialRecord],
    finalists: Sequence[Finalist],
    *,
    cost: Cost,
    seconds: float,
    seen_in_training: bool,
) -> dict[str, Any]:
    """Write the first finalist's model, its test scores, the report and the result."""
    config, stage = experiment.tune, experiment.folder / "tune"
    run = finalists[0].best_run()
    (stage / "seeds" / run.name / "model").copy_to(stage / "model", last="config.json")
    add_ngrams(experiment, display, stage, stage / "baseline")
    base = TrialConfig(model=experiment.model, finetune=experiment.finetune)
    won = base.with_values({**run.values, "finetune.seed": run.seed})
    winner = experiment.model_copy(update={"model": won.model, "finetune": won.finetune})
    stage.write_text(WINNER, dump(winner))
    metric = _metric_of(finalists)
    content = {
        "searcher": config.searcher,
        "scheduler": config.scheduler.kind,
        "metric": metric,
        "dimensions": [asdict(dimension) for dimension in space.dimensions],
        "trials": [trial.as_json(metric) for trial in trials],
        "finalists": [finalist.as_json(metric) for finalist in finalists],
        "importance": {"method": METHOD, "shares": importance(space, trials)},
        "cost": asdict(cost),
    }
    stage.write_json(TRIALS, finite(content))  # the report is made from it
    result = search_result(trials, finalists, cost, seconds)
    result |= {"model": (stage / "model").uri, "config": (stage / WINNER).uri, "run": run.name}
    if config.test:
        metrics = stored_metrics(experiment, stage)  # by a session that was killed afterwards
        if metrics is None:
            metrics = evaluate_model(experiment, stage / "model", display)
            stage.write_json(METRICS, finite(metrics))
        scores = finite(_test_scores(metrics, metric))
        result["test"] = {**scores, "seen_in_training": seen_in_training}
    stage.delete("ray")  # left by sessions that were killed
    result = write_report_and_result(stage, result, display)
    if not config.keep_models:
        runs = [run for finalist in finalists for run in finalist.runs]
        for folder, records in (("trials", trials), ("seeds", runs)):
            for record in records:
                (stage / folder / record.name).delete("model")
    display.print(f"tune      {format_best(result)}; model in {result['model']}")
    return result


def _metric_of(finalists: Sequence[Finalist]) -> str:
    best = finalists[0].best_run().best
    assert best is not None  # the first of the ranking has a score
    return best.metric


def _test_scores(metrics: dict[str, Any], metric: str) -> dict[str, Any]:
    """The winner's scores on the test texts: the metric of the search, and the usual ones."""
    metric = metric if metric in metrics else metric_of(metrics)
    kept = dict.fromkeys((metric, metric_of(metrics), "loss", "f1_macro", "n"))
    return {"metric": metric, **{key: metrics[key] for key in kept if key in metrics}}


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
    metric, default = metric_of(result["best"]), result["default"]
    best = mean_and_deviation(result["best"]["seeds"][metric])
    parts = [f"trial {result['best']['trial']}, validation {metric} {best}"]
    if default is not None:
        parts.append(f"the configured values {mean_and_deviation(default['seeds'][metric])}")
    if "test" in result:
        parts.append(f"test {headline(result['test'])}")
    return f"{', '.join(parts)}, in {clock(result['seconds'])}"


def search_result(
    trials: Sequence[TrialRecord], finalists: Sequence[Finalist], cost: Cost, seconds: float
) -> dict[str, Any]:
    """The result of `raybert tune --json`, without the keys of the winner's model."""
    first = configured_trial(trials)
    default = next(
        (f for f in finalists if first is not None and f.trial.values == first.values), None
    )
    metric = _metric_of(finalists)
    found = {
        "trials": {"all": len(trials), **count_states(trials)},
        "best": finalists[0].as_json(metric),
        "default": None if default is None else default.as_json(metric),
        "seconds": round(seconds, 1),
        "cost": asdict(cost),
    }
    return dict(finite(found))
