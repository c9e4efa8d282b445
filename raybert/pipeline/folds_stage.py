"""`raybert finetune --folds N`: cross-validation, N runs that are each validated on another part.

`<storage>/<name>/folds/` holds a run `1-of-N/` to `N-of-N/` for each fold, and `result.json`. Runs
that are finished are kept when the command is run again, and when N changes.
"""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from raybert.cluster.session import Resources
from raybert.config import dump
from raybert.errors import ConfigError, damaged_file
from raybert.experiment import Experiment
from raybert.pipeline.finetune_setup import known_inputs, peek_training, prepare_finetune
from raybert.pipeline.named_sources import with_sources
from raybert.pipeline.ray_stage import shown_ray_session
from raybert.pipeline.stages import train
from raybert.records import format_mean, measures, metric_of
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec
from raybert.tasks.prepared_texts import check_same_texts
from raybert.terminal.display import Display
from raybert.terminal.formats import clock, mean_and_deviation
from raybert.train.run_folder import CONFIG, RESULT, open_run

_SECTIONS = ("model",)  # that affect the result, beside `finetune`


def finetune_folds(
    experiment: Experiment, display: Display, folds: int, *, in_process: bool = False
) -> dict[str, Any]:
    """Fine-tune once for each fold; returns each fold's metrics, their mean and deviation.

    Raises:
        ConfigError: texts to validate on are configured, too.
    """
    if experiment.finetune.validation is not None:
        raise ConfigError(
            "finetune.validation names texts to validate on, and --folds validates on parts of "
            "finetune.source; leave one of them out"
        )
    experiment, stage = with_sources(experiment), experiment.folder / "folds"
    stored = _stored_result(experiment, stage, folds)
    if stored is not None:
        display.print(f"folds     {stage} is finished already: {_format_mean(stored)}")
        return stored
    begun = time.monotonic()
    session: AbstractContextManager[Resources | None] = (
        nullcontext()
        if in_process
        else shown_ray_session(experiment, display, experiment.finetune.max_workers)
    )
    if not stage.exists(CONFIG):
        peek_training(experiment)
    with session:
        # All texts first: a mistake in one part is found before the first run.
        runs = [
            _Fold.prepare(experiment, display, stage, number, folds, on_ray=not in_process)
            for number in range(1, folds + 1)
        ]
        if not stage.exists(CONFIG):  # settings that were rejected leave none
            inputs = runs[0].spec.inputs()
            open_run(stage, dump(experiment), "finetune", _SECTIONS, inputs=inputs)
        found = [fold.train(experiment, display, in_process=in_process) for fold in runs]
    metric = metric_of(found[0])
    values = [fold[metric] for fold in found if metric in fold]
    summary: dict[str, Any] = {
        "metric": metric,
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "folds": found,
        "seconds": round(time.monotonic() - begun, 1),
    }
    stage.write_json(RESULT, summary)
    display.print(
        f"folds     {_format_mean(summary)}, in {clock(summary['seconds'])}; models in {stage}"
    )
    return summary


def format_folds(result: dict[str, Any]) -> str:
    """A line for each fold, then the mean with its standard deviation."""
    metric = result["metric"]
    lines = [f"{'fold':<6}{metric:>10}  {'loss':>10}  texts"]
    lines += [
        f"{fold['fold']:<6}{format_mean(fold.get(metric)):>10}  "
        f"{format_mean(fold.get('loss')):>10}  {fold['n']:,}"
        for fold in result["folds"]
    ]
    return "\n".join([*lines, _format_mean(result)])


def _stored_result(experiment: Experiment, stage: Folder, folds: int) -> dict[str, Any] | None:
    """The stored result; None where there is none, or one of another number of folds."""
    if not stage.exists(CONFIG):
        return None
    inputs = known_inputs(experiment)
    result = open_run(stage, dump(experiment), "finetune", _SECTIONS, inputs=inputs)
    check_same_texts(experiment.finetune, stage / f"1-of-{folds}" / "data")
    if result is None:
        return None
    with damaged_file(stage.join(RESULT)):
        if len(result["folds"]) == folds and format_folds(result):
            return result
    stage.delete(RESULT)  # of another number of folds
    return None


@dataclass(frozen=True)
class _Fold:
    """One of the runs, with its texts."""

    number: int  # from 1
    title: str
    run: Folder
    spec: FinetuneSpec

    @classmethod
    def prepare(
        cls,
        experiment: Experiment,
        display: Display,
        stage: Folder,
        number: int,
        folds: int,
        *,
        on_ray: bool,
    ) -> _Fold:
        """Read, split and tokenize the texts, unless that is done."""
        run = stage / f"{number}-of-{folds}"
        spec = prepare_finetune(
            experiment,
            display,
            run / "data",
            has_begun=run.exists(CONFIG),
            on_ray=on_ray,
            fold=(number - 1, folds),
        )
        spec.check()
        return cls(number, f"fold {number}/{folds}", run, spec)

    def train(
        self, experiment: Experiment, display: Display, *, in_process: bool
    ) -> dict[str, Any]:
        """Train the run, unless it is finished; returns the metrics of its best evaluation."""
        if self.run.exists(RESULT):
            inputs = self.spec.inputs()
            result = open_run(self.run, dump(experiment), "finetune", _SECTIONS, inputs=inputs)
            result = result or {}
            display.print(f"{self.title:<9} {self.run} is finished already")
        else:
            result = train(
                "finetune",
                self.spec,
                experiment,
                display,
                _SECTIONS,
                in_process,
                self.run,
                self.title,
            )
        names = self.spec.prepared.make_task().selection_metrics
        scores = {name: value for name, value in measures(result).items() if name in names}
        return {
            "fold": self.number,
            "metric": metric_of(result),
            **scores,
            "n": self.spec.prepared.validation.rows,
            "model": result["model"],
        }


def _format_mean(result: dict[str, Any]) -> str:
    return f"{result['metric']} {mean_and_deviation(result)} over {len(result['folds'])} folds"
