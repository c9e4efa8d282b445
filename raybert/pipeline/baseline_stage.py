"""The linear baseline of an experiment: fitted on its texts, scored beside its model.

`baseline/` in the experiment's folder holds the linear model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raybert.data.sources.settings import SourceConfig
from raybert.experiment import Experiment
from raybert.storage.folder import Folder
from raybert.tasks.prepared_texts import SplitTexts
from raybert.terminal.display import Display

if TYPE_CHECKING:
    from raybert.tasks.linear.baseline import Baseline


def folder_of(experiment: Experiment) -> Folder:
    """Where the linear model of an experiment is."""
    return experiment.folder / "baseline"


def baseline(experiment: Experiment, display: Display) -> dict[str, Any]:
    """Fit a linear model on the experiment's labelled texts, and evaluate it; without Ray."""
    from raybert.data.sources.columns import REMEMBERED, with_columns_of
    from raybert.pipeline.named_sources import require_source, with_sources
    from raybert.tasks.labelled import resolve_source
    from raybert.tasks.prepared_texts import read_and_split

    experiment = with_sources(experiment)
    config = experiment.finetune
    require_source(config.source, "finetune.source")
    require_source(experiment.evaluate.source, "evaluate.source")
    with display.stage("baseline"):
        display.progress("reading labelled texts")
        resolved = resolve_source(config.source, config.task)
        fitted = fit(experiment, display, read_and_split(config, resolved, config.seed))
        columns = resolved.source.model_dump(include=set(REMEMBERED))
        display.progress("scoring the evaluation texts")
        return evaluate(fitted, with_columns_of(experiment.evaluate.source, columns))


def fitter(
    experiment: Experiment, display: Display, folder: Folder | None = None
) -> Callable[[SplitTexts], dict[str, Any]] | None:
    """A function that fits the linear model of a split; None where none is configured."""
    if not experiment.finetune.baseline:
        return None
    return lambda texts: fit(experiment, display, texts, folder).summary


def fit(
    experiment: Experiment, display: Display, texts: SplitTexts, folder: Folder | None = None
) -> Baseline:
    """Fit the linear model, and keep it in `folder`, by default the experiment's."""
    from raybert.tasks.linear.baseline import MAX_UNLABELLED, fit_baseline
    from raybert.tasks.linear.store import save_baseline
    from raybert.tasks.prepared_texts import unlabelled_texts

    config = experiment.finetune
    unlabelled: list[str] = []
    if config.unlabelled is not None:
        display.progress("reading texts without labels")
        found_texts = unlabelled_texts(config, config.unlabelled)
        unlabelled = list(itertools.islice(found_texts, MAX_UNLABELLED))
    display.progress("fitting linear models on n-grams")
    found = fit_baseline(
        texts.task,
        texts.train,
        texts.validation,
        metric=config.metric,
        seed=config.seed,
        unlabelled=unlabelled,
        # A teacher would show its students the validation texts' labels.
        refit=config.validation is None and config.unlabelled is None,
    )
    save_baseline(found, folder or folder_of(experiment))
    metric = config.metric or found.task.default_metric
    display.print(
        f"baseline  {found.description}: validation {metric} {found.metrics[metric]:.4f}, "
        f"{found.seconds:.0f} s"
    )
    return found


def evaluate(fitted: Baseline, source: SourceConfig) -> dict[str, Any]:
    """Score a baseline on labelled texts, as a model is scored."""
    from raybert.tasks.labelled import read_labelled

    task = fitted.task
    texts = read_labelled(source, type(task), task.labels)
    predictions = fitted.predictions(texts)
    return {
        **task.evaluate(predictions.outputs, predictions.targets),
        "task": task.name,
        "metric": task.default_metric,
        "model": fitted.description,
        "seconds": round(fitted.seconds, 1),
        "skipped": texts.skipped,
    }


def format_comparison(metrics: dict[str, Any]) -> str:
    """Compare a model's metrics with the baseline's in a line; say what to try if it loses."""
    found = metrics["baseline"]
    metric, (low, high) = found["metric"], found["interval"]
    linear = f"{metric} {found['metrics'][metric]:.4f}, a {found['description']}"
    if high < 0:
        return (
            f"{linear}: better than the model by {-found['difference']:.4f} (95% interval "
            f"{-high:.4f} to {-low:.4f}); longer texts (finetune.seq_len), more pretraining "
            "(pretrain.minutes, more text) or a public encoder (finetune.initialize_from) may help"
        )
    certain = "better than it by" if low > 0 else "not certainly different:"
    return (
        f"{linear}; the model is {certain} {found['difference']:.4f} "
        f"(95% interval {low:.4f} to {high:.4f})"
    )
