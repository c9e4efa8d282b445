"""Commands of the stages: demo, run, corpus, pretrain, finetune, evaluate, report, tune."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from raybert.cli.options import (
    ConfigOption,
    DataOption,
    FromOption,
    InProcessOption,
    JsonOption,
    LabelColumnOption,
    ModelOption,
    NameOption,
    SetOption,
    TextColumnOption,
    check_model,
    load_experiment,
    load_model_folder,
    new_display,
    print_result,
)
from raybert.errors import UserError
from raybert.records import format_mean, measures, metric_of, selected

app = typer.Typer()

_MATRIX_LABELS = 12  # the largest confusion matrix that is printed


@app.command()
def demo(
    name: NameOption = None,
    overrides: SetOption = None,
    text: Annotated[str, typer.Option(help="A sentence to classify at the end.")] = (
        "The plot was thin, but the actors made it a joy to watch."
    ),
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline on real movie reviews: about a quarter of an hour on two cores.

    Example: `raybert demo --text "What a waste of two hours."`
    """
    from raybert.pipeline.run_stages import run_demo

    if not text.strip():
        raise UserError("--text is empty; pass a sentence")
    path = Path(__file__).parents[1] / "demo.yaml"
    print_result(run_demo(load_experiment(path, overrides, name), new_display(), text), as_json)


@app.command()
def run(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    start: FromOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run all stages of a configuration: corpus, pretraining, fine-tuning, evaluation, report.

    Examples: `raybert run -c configs/keras-mini.yaml`,
    `raybert run -n mine --data reviews.csv --from sentence-transformers/all-MiniLM-L6-v2`
    """
    experiment = load_experiment(
        config,
        overrides,
        name,
        data,
        text_column=text_column,
        label_column=label_column,
        reads=("finetune", "corpus", "evaluate"),  # the first names all columns
        start=start,
    )
    from raybert.pipeline.run_stages import format_run, run_stages

    result = run_stages(experiment, new_display())
    print_result(result, as_json, None if as_json else format_run(experiment, result))


@app.command()
def corpus(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    start: FromOption = None,
    text_column: TextColumnOption = None,
    force: Annotated[bool, typer.Option(help="Rebuild a corpus that exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tokenize text into rows, as a Ray Data job.

    Example: `raybert corpus -n mine --set corpus.source.path=reviews.parquet`
    """
    experiment = load_experiment(
        config, overrides, name, data, text_column=text_column, reads=("corpus",), start=start
    )
    from raybert.pipeline import stages

    print_result(stages.make_corpus(experiment, new_display(), force=force), as_json)


@app.command()
def pretrain(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    start: FromOption = None,
    in_process: InProcessOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pretrain an encoder on a corpus. Running the same name again resumes it.

    Example: `raybert pretrain -n mine --set pretrain.minutes=30 --set pretrain.workers=2`
    """
    experiment = load_experiment(config, overrides, name, data, start=start)
    from raybert.pipeline import stages

    print_result(stages.pretrain(experiment, new_display(), in_process=in_process), as_json)


@app.command()
def finetune(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    start: FromOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    in_process: InProcessOption = False,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Train an ensemble of so many seeds.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, help="Cross-validate: so many runs, each validated on another part."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--distill-from", help="A teacher model or ensemble; sets finetune.distill.teacher."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model on labelled texts. Running the same name again resumes it.

    Examples: `raybert finetune -n mine --set finetune.source.path=labelled.csv`,
    `raybert finetune -n mine --folds 5`, `raybert finetune -n large --seeds 5`,
    `raybert finetune -n small --distill-from runs/large`
    """
    distill = [f"finetune.distill.teacher={json.dumps(teacher)}"] if teacher is not None else []
    experiment = load_experiment(
        config,
        [*(overrides or []), *distill],
        name,
        data,
        text_column=text_column,
        label_column=label_column,
        reads=("finetune",),
        run="ensemble" if seeds is not None else "finetune" if folds is None else "folds",
        start=start,
        command="finetune",
    )
    from raybert.pipeline import self_training_stage

    if seeds is not None and folds is not None:
        raise UserError(
            "--seeds trains on one split, --folds on several: leave one out, or run them one after "
            "the other"
        )
    if experiment.finetune.unlabelled is not None and (seeds or folds) is not None:
        option = "--seeds" if folds is None else "--folds"
        raise UserError(f"finetune.unlabelled has no effect with {option}; leave one of them out")
    if folds is not None:
        from raybert.pipeline.folds_stage import finetune_folds, format_folds

        result = finetune_folds(experiment, new_display(), folds, in_process=in_process)
        print_result(result, as_json, format_folds(result))
        return
    if seeds is None:
        result = self_training_stage.finetune(experiment, new_display(), in_process=in_process)
        print_result(result, as_json)
        return
    if in_process:
        raise UserError("--seeds trains several seeds at a time on Ray; leave --bare out")
    from raybert.pipeline.ensemble_stage import finetune_seeds

    print_result(finetune_seeds(experiment, new_display(), seeds), as_json)


@app.command()
def evaluate(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    model: ModelOption = None,
    split: Annotated[
        str | None, typer.Option(help="train or test; sets evaluate.source.split.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a fine-tuned model on a held-out test set.

    Example: `raybert evaluate -m runs/mine --set evaluate.source.path=test.csv`
    """
    splits = [f"evaluate.source.split={split}"] if split is not None else []
    check_model(model)
    experiment = load_experiment(
        config,
        [*(overrides or []), *splits],
        name,
        data,
        text_column=text_column,
        label_column=label_column,
        reads=("evaluate",),
    )
    from raybert.pipeline import stages

    if model is None:
        metrics = stages.evaluate(experiment, new_display())
    else:
        folder = load_model_folder(model, experiment)
        metrics = stages.evaluate_model(experiment, folder, new_display())
    print_result(metrics, as_json, None if as_json else _format_scores(metrics))


@app.command()
def baseline(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a linear model on n-grams of the labelled texts, and evaluate it: what to beat.

    Example: `raybert baseline -n mine --set finetune.source.path=labelled.csv`
    """
    from raybert.pipeline.baseline_stage import baseline as fit

    metrics = fit(load_experiment(config, overrides, name, data), new_display())
    print_result(metrics, as_json, None if as_json else _format_scores(metrics))


@app.command()
def report(
    path: Annotated[str, typer.Argument(help="A run's or an experiment's folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write `report.html`, one self-contained file of curves, scores and examples.

    Example: `raybert report runs/demo`
    """
    from raybert.report import write_report
    from raybert.storage.folder import Folder
    from raybert.storage.missing import near_names

    folder = Folder(path)
    if not folder.exists():
        raise UserError(f"{path}: no such folder{near_names(path)}; name a run or an experiment")
    write_report(folder)
    written = (folder / "report.html").uri
    print_result({"report": written}, as_json, written)


@app.command()
def tune(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    start: FromOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Sets tune.trials.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes of the search; sets tune.minutes.")
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve Ray's and TensorBoard's pages meanwhile.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Search fine-tuning hyperparameters. Running the same name again resumes the search.

    Example: `raybert tune -c configs/tune.yaml --trials 40 --minutes 120`
    """
    given = {"tune.trials": trials, "tune.minutes": minutes}
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    experiment = load_experiment(
        config,
        [*(overrides or []), *more],
        name,
        data,
        text_column=text_column,
        label_column=label_column,
        reads=("finetune", "evaluate"),
        run="tune",
        start=start,
        command="tune",
    )
    from raybert.pipeline.tune_stage import tune as search

    result = search(experiment, new_display(), dashboard=dashboard)
    print_result(result, as_json, None if as_json else _format_search(result))


def _format_scores(metrics: dict[str, Any]) -> str:
    from raybert.tasks.registry import tables_of

    lines = [f"{name:<28}{value:.4f}" for name, value in measures(metrics).items()]
    for table in tables_of(metrics):
        lines.append(format_table([table.head, *table.rows]))
    confusion = metrics.get("confusion", [])
    if 0 < len(confusion) <= _MATRIX_LABELS:  # a row for each label, a column for each prediction
        names = list(metrics.get("label_names") or metrics["per_class"])
        rows = [[n, *(f"{c:,}" for c in row)] for n, row in zip(names, confusion, strict=True)]
        lines.append(format_table([["label \\ predicted", *names], *rows]))
    return "\n".join(lines)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first one to the left, the others to the right."""
    first, *rest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, rest, strict=True))
        lines.append("  ".join([name.ljust(first), *aligned]))
    return "\n".join(lines)


def _format_search(result: dict[str, Any]) -> str:
    """Format the winner's scores beside those of the configured values."""
    best, default = result["best"], result["default"]
    lines = [f"{'':<22}{f'validation {metric_of(best)}':<28}values"]
    for title, found in (("winner", best), ("configured values", default)):
        if found is not None:
            lines.append(f"{title:<22}{_format_spread(found):<28}{json.dumps(found['config'])}")
    if "test" in result:
        lines.append(
            f"{'winner on the test':<22}{format_mean(selected(result['test'])[1])} "
            f"({result['test']['n']:,} texts)"
        )
    lines += ["", f"Model: {result['model']}", f"Configuration: {result['config']}"]
    if result.get("report"):
        lines.append(f"Report: {result['report']}")
    return "\n".join(lines)


def _format_spread(found: dict[str, Any]) -> str:
    from raybert.terminal.formats import mean_and_deviation

    spread, seeds = found["seeds"][metric_of(found)], found["seeds"]["n"]
    return mean_and_deviation(spread) + (f", {seeds} seeds" if seeds else "")
