"""The command line: one short function a command; heavy imports stay inside them."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from raybert.cli import job_commands, run_commands, serve_commands, tune_commands
from raybert.cli.options import (
    ConfigOption,
    DataOption,
    JsonOption,
    ModelOption,
    NameOption,
    SetOption,
    load_experiment,
    new_display,
    print_json,
)
from raybert.errors import INTERRUPTED, DamagedError, RaybertError, StorageError, UserError

if TYPE_CHECKING:
    from raybert.experiment import Experiment

app = typer.Typer(
    name="raybert",
    help="From raw text to a BERT of your own and a classifier that stands on it, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

bench_app = typer.Typer(help="Measure raybert on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(tune_commands.app)
app.add_typer(job_commands.app)
app.add_typer(serve_commands.app)
app.add_typer(run_commands.app, name="runs")

BareOption = Annotated[
    bool, typer.Option("--bare", help="Train in this process, without Ray: to debug, to measure.")
]


def main() -> None:
    """Run the command line; mistakes of the user's end in one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer's own ends
            raise
        _say("interrupted; run the same command again to go on")
        sys.exit(INTERRUPTED)
    except RaybertError as error:
        if _DEBUG:
            raise
        _say(str(error))
        sys.exit(2 if isinstance(error, _MENDABLE) else 1)
    except OSError as error:
        if _DEBUG or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _say(f"{error.filename or 'writing'}: {error.strerror}; free some space, and go on")
        with suppress(OSError):  # what standard output still holds can't be written either
            sys.stdout.close()
        sys.exit(2)


# What a user can mend: the input, the storage, a file that is damaged.
_MENDABLE = (UserError, StorageError, DamagedError)
_MATRIX_LABELS = 12  # of a confusion matrix on a terminal
_DEBUG = bool(os.environ.get("RAYBERT_DEBUG"))


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _DEBUG
    _DEBUG = _DEBUG or debug


@app.command()
def demo(
    name: NameOption = None,
    overrides: SetOption = None,
    text: Annotated[str, typer.Option(help="A sentence of yours, to classify at the end.")] = (
        "The plot was thin, but the actors made it a joy to watch."
    ),
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline on real movie reviews: about a quarter of an hour on two cores.

    Example: `raybert demo --text "What a waste of two hours."`
    """
    from raybert.pipeline.demo import run_demo

    if not text.strip():
        raise UserError("--text is empty; give it a sentence")
    path = Path(__file__).parents[1] / "demo.yaml"
    _print(run_demo(load_experiment(path, overrides, name), new_display(), text), as_json)


@app.command()
def run(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run all stages of a configuration: corpus, pretraining, fine-tuning, evaluation, report.

    Example: `raybert run -c configs/keras-mini.yaml`
    """
    from raybert.pipeline.demo import run_stages

    _print(run_stages(load_experiment(config, overrides, name, data), new_display()), as_json)


@app.command()
def corpus(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    force: Annotated[bool, typer.Option(help="Make it again, even if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tokenize text into rows, as a Ray Data job.

    Example: `raybert corpus -n mine --set corpus.source.path=reviews.parquet`
    """
    from raybert.pipeline import stages

    experiment = load_experiment(config, overrides, name, data)
    _print(stages.make_corpus(experiment, new_display(), force=force), as_json)


@app.command()
def pretrain(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    bare: BareOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pretrain an encoder on a corpus. Running the same name again resumes it.

    Example: `raybert pretrain -n mine --set pretrain.minutes=30 --set pretrain.workers=2`
    """
    from raybert.pipeline import stages

    experiment = load_experiment(config, overrides, name, data)
    _print(stages.pretrain(experiment, new_display(), bare=bare), as_json)


@app.command()
def finetune(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    bare: BareOption = False,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Train so many, with other seeds: an ensemble.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--distill-from", help="A model or an ensemble that teaches; see finetune.distill."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a classifier on labelled texts. Running the same name again resumes it.

    Examples: `raybert finetune -n mine --set finetune.source.path=labelled.csv`,
    `raybert finetune -n large --seeds 5`, `raybert finetune -n small --distill-from runs/large`
    """
    from raybert.pipeline import stages

    taught = [f"finetune.distill.teacher={json.dumps(teacher)}"] if teacher is not None else []
    experiment = load_experiment(config, [*(overrides or []), *taught], name, data)
    if seeds is None:
        _print(stages.finetune(experiment, new_display(), bare=bare), as_json)
        return
    if bare:
        raise UserError("--seeds runs on Ray, several at a time; leave --bare out")
    from raybert.pipeline.ensemble_stage import finetune_seeds

    _print(finetune_seeds(experiment, new_display(), seeds), as_json)


@app.command()
def evaluate(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    model: ModelOption = None,
    split: Annotated[
        str | None, typer.Option(help="Of the source: train, test; sets evaluate.source.split.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a classifier on labelled texts that nothing was chosen on.

    Example: `raybert evaluate -m runs/mine --set evaluate.source.path=test.csv`
    """
    from raybert.pipeline import stages

    chosen = [f"evaluate.source.split={split}"] if split is not None else []
    experiment = load_experiment(config, [*(overrides or []), *chosen], name, data)
    if model is None:
        metrics = stages.evaluate(experiment, new_display())
    else:
        metrics = stages.evaluate_model(experiment, _model(model, experiment), new_display())
    if as_json:
        _print(metrics, as_json)
    else:
        _print_scores(metrics)


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: lines of stdin.")] = None,
    model: ModelOption = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help="A file of texts, read through Ray Data.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="For --input: a .jsonl or .parquet file.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, as it is without this, too.")
    ] = False,
) -> None:
    """Label raw texts: arguments, lines of standard input, or files of millions.

    Answers are JSON, one object a line; `row` is the number of the text's line or argument from 0.

    Examples: `raybert predict -m runs/mine "A joy."`,
    `raybert predict -m runs/mine -i reviews.parquet -o labels.jsonl`
    """
    from raybert.pipeline import predict_stage as bulk

    experiment = load_experiment(config, overrides, name)
    folder = _model(model, experiment)
    if source is not None:
        if output is None:
            raise UserError("--input needs --output: name a .jsonl or a .parquet file")
        _print(bulk.predict_file(experiment, folder, source, output, new_display()), as_json=True)
        return
    for number, text in enumerate(texts or [], 1):
        if not text.strip():
            raise UserError(f"text {number} is empty; give it words, or leave it out")
    batches = (
        bulk.numbered(texts) if texts else bulk.lines(cast(io.BufferedReader, sys.stdin.buffer))
    )
    row = None
    for row in bulk.predict_texts(folder, batches, experiment.serve.precision):
        _print(row, as_json=True)
    if row is None:
        raise UserError("standard input has no text; give one a line, or texts as arguments")


@app.command("fill-mask")
def fill_mask(
    text: Annotated[str, typer.Argument(help="A text with one or more [MASK].")],
    model: ModelOption = None,
    top: Annotated[int, typer.Option(min=1, help="Guesses for each mask.")] = 5,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Guess what stands in place of each [MASK].

    Example: `raybert fill-mask -m runs/demo "I have watched this [MASK] and it was awesome."`
    """
    from raybert.pipeline import predict_stage as bulk

    experiment = load_experiment(config, overrides, name)
    found = bulk.fill_mask(_model(model, experiment, "pretrain"), text, top)
    if as_json:
        _print({"text": text, "masks": found}, as_json)
    else:
        for number, guesses in enumerate(found, 1):
            for guess in guesses:
                print(f"{number}  {guess['probability']:.4f}  {guess['token']}")


@app.command()
def report(
    path: Annotated[str, typer.Argument(help="A run's or an experiment's folder.")],
    as_json: JsonOption = False,
) -> None:
    """Write `report.html`: curves, scores, examples; one self-contained file.

    Example: `raybert report runs/demo`
    """
    from raybert.report import write_report
    from raybert.storage.folder import Folder

    folder = Folder(path)
    if not folder.exists():
        raise UserError(f"{path}: no such folder; name a run or an experiment")
    write_report(folder)
    written = (folder / "report.html").uri
    if as_json:
        _print({"report": written}, as_json)
    else:
        print(written)


@app.command("config")
def show_config(
    config: ConfigOption = None,
    overrides: SetOption = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved configuration, or the schema by which editors check the YAML.

    Example: `raybert config --schema > raybert.schema.json`
    """
    from raybert.config import dump
    from raybert.experiment import Experiment

    if schema and as_json:
        _print(Experiment.model_json_schema(), as_json)
    elif schema:
        print(json.dumps(Experiment.model_json_schema(), indent=2))
    elif as_json:
        _print(load_experiment(config, overrides, None).model_dump(mode="json"), as_json)
    else:
        print(dump(load_experiment(config, overrides, None)), end="")


@bench_app.command("train")
def bench_train(
    config: ConfigOption = None,
    overrides: SetOption = None,
    bare: BareOption = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Training processes.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the training loop on generated words, under Ray or bare.

    Example: `raybert bench train -c configs/bench-keras.yaml --workers 2 --threads 1`
    """
    from raybert.pipeline import benchmarks

    given = {"pretrain.workers": workers, "pretrain.threads": threads}
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    experiment = load_experiment(config, [*(overrides or []), *more], None)
    result = benchmarks.bench_train(experiment, bare=bare, display=new_display())
    if as_json:
        _print(result, as_json)
    else:
        print(f"{result['tokens_per_second']:,.0f} tokens/s over {result['steps']} steps")


@bench_app.command("serve")
def bench_serve(
    model: ModelOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    texts: Annotated[int, typer.Option(min=1, help="Of the evaluation source, at most.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Measure what each precision gains and costs; the best one is kept with the model.

    Example: `raybert bench serve -m runs/mine --set evaluate.source.path=test.csv`
    """
    from raybert.pipeline import benchmarks

    experiment = load_experiment(config, overrides, name)
    result = benchmarks.bench_serve(experiment, _model(model, experiment), texts, new_display())
    if as_json:
        _print(result, as_json)
        return
    for precision, found in result["measured"].items():
        print(
            f"{precision:<10}{found['texts_per_second']:>10,.1f} texts/s  "
            f"accuracy {found['accuracy']:.4f} ({0.0 - found['points_lost']:+.2f} points)"
        )
    kept = "kept with the model" if result["stored"] else "not kept: the model can't be written to"
    print(f"{result['precision']} for {result['machine']}: {kept}")


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the versions of raybert and of what it stands on."""
    from raybert.jobs.doctor.nodes import versions

    if as_json:
        _print(versions(), as_json)
    else:
        for package, number in versions().items():
            print(f"{package} {number}")


def _model(path: str | None, experiment: Experiment, stage: str = "finetune") -> Any:
    from raybert.storage.model_folders import resolve_model

    if path is None:
        return resolve_model((experiment.folder / stage).uri)
    return resolve_model(path, stage)


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)


def _print_scores(metrics: dict[str, Any]) -> None:
    for key in ("accuracy", "loss", "f1_macro", "expected_calibration_error"):
        print(f"{key:<28}{metrics[key]:.4f}")
    for label, scores in metrics["per_class"].items():
        shown = "  ".join(f"{k} {v:.4f}" if k != "support" else f"n {v}" for k, v in scores.items())
        print(f"{label:<28}{shown}")
    if len(metrics["confusion"]) <= _MATRIX_LABELS:
        print(_matrix(list(metrics["per_class"]), metrics["confusion"]))


def _matrix(names: list[str], counts: list[list[int]]) -> str:
    """A confusion matrix as text: a row for each true label, a column for each prediction."""
    head = "label \\ predicted"
    rows = [[head, *names]]
    rows += [[name, *(f"{n:,}" for n in row)] for name, row in zip(names, counts, strict=True)]
    first, *rest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, rest, strict=True))
        lines.append("  ".join([name.ljust(first), *aligned]))
    return "\n".join(lines)


def _say(text: str) -> None:
    print(f"raybert: {text}", file=sys.stderr)
