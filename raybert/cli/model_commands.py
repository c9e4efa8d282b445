"""Commands that use a model: predict, fill-mask, serve, promote, rollback."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from raybert.cli.options import (
    ConfigOption,
    JsonOption,
    ModelOption,
    NameOption,
    SetOption,
    TextColumnOption,
    check_model,
    load_experiment,
    load_model_folder,
    new_display,
    print_json,
    print_result,
)
from raybert.errors import UserError

if TYPE_CHECKING:
    from raybert.storage.registry import Registry

app = typer.Typer()

RegisteredArgument = Annotated[str, typer.Argument(help="The model's name in the registry.")]


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: lines of stdin.")] = None,
    model: ModelOption = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help="A file of texts, read through Ray Data.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="With --input: a .jsonl, .csv or .parquet file."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="With --input: a column to write, too; ids (the default), or all."),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pair", help="The second text, for a model of pairs; one for each text."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Scores of each text at most, the best.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Leave lower scores out; replaces the thresholds of the model."),
    ] = None,
    text_column: TextColumnOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per line; the default.")
    ] = False,
) -> None:
    """Predict texts: arguments, lines of standard input, or files through Ray Data.

    Prints one JSON object per line; `row` is the index of the text's line or argument, from 0. A
    model of pairs reads lines of two texts with a tab between them.

    Examples: `raybert predict -m runs/mine "A joy."`,
    `raybert predict -m runs/pairs "A dog runs." --pair "An animal moves."`,
    `raybert predict -m runs/mine -i reviews.csv -o labels.csv --keep author`
    """
    check_model(model)
    if source is None and (output is not None or keep):
        raise UserError("--output and --keep are for files: name one with --input")
    if source is not None:
        from raybert.pipeline import preflight

        if texts or pairs is not None:
            raise UserError("--input reads a file; leave out the texts of the command line")
        if output is None:
            raise UserError("--input needs --output: name a .jsonl, a .csv or a .parquet file")
        preflight.check_prediction(source, output, text_column)
    experiment = load_experiment(config, overrides, name, text_column=text_column)
    from raybert.data.tokenizer import check_unicode
    from raybert.pipeline import predict_stage
    from raybert.tasks.protocol import AnswerOptions

    folder = load_model_folder(model, experiment)
    options = AnswerOptions(top_k=top_k, threshold=threshold)
    if pairs is not None and len(pairs) != len(texts or []):
        raise UserError(
            f"--pair: {len(pairs)} second texts for {len(texts or [])} texts; give one for each "
            "text argument, or write lines of two texts with a tab between them"
        )
    predict_stage.check_answer_options(folder, options, has_pairs=pairs is not None)
    if source is not None and output is not None:
        print_json(
            predict_stage.predict_file(
                experiment, folder, source, output, new_display(), options, keep or ()
            )
        )
        return
    for what, several in (("text", texts), ("--pair", pairs)):
        for number, text in enumerate(several or [], 1):
            if not text.strip():
                raise UserError(f"{what} {number} is empty; remove it, or write a text")
        check_unicode(several or [])
    stdin = cast(io.BufferedReader, sys.stdin.buffer)
    given = texts if pairs is None else list(zip(texts or [], pairs, strict=True))
    batches = predict_stage.number_texts(given) if given else predict_stage.read_lines(stdin)
    row = None
    for row in predict_stage.predict_texts(folder, batches, experiment.serve.precision, options):
        print_json(row)
    if row is None:
        raise UserError("standard input has no text; pass one text per line, or texts as arguments")


@app.command("fill-mask")
def fill_mask(
    text: Annotated[str, typer.Argument(help="A text with one or more [MASK].")],
    model: ModelOption = None,
    top: Annotated[int, typer.Option(min=1, help="Candidates for each mask.")] = 5,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict the tokens at each [MASK].

    Example: `raybert fill-mask -m runs/demo "I have watched this [MASK] and it was awesome."`
    """
    from raybert.data.tokenizer import check_unicode
    from raybert.inference.fill_mask import MaskFiller

    check_unicode([text])
    experiment = load_experiment(config, overrides, name)
    found = MaskFiller(load_model_folder(model, experiment, "pretrain")).fill(text, top)
    lines = [
        f"{number}  {token['probability']:.4f}  {token['token']}"
        for number, tokens in enumerate(found, 1)
        for token in tokens
    ]
    print_result({"text": text, "masks": found}, as_json, "\n".join(lines))


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A `model/`, a run, an experiment, or a name in the registry."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Sets serve.host; 0.0.0.0 requires serve.keys.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Sets serve.port.")] = None,
    keys: Annotated[str | None, typer.Option(help="Sets serve.keys, a file of keys.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a model over HTTP until Ctrl-C: labels, word attributions, masked words, a page.

    It exits with an error when no replica answers for five minutes.

    Example: `raybert serve runs/demo`, then open http://127.0.0.1:8000
    """
    from raybert.cluster.interrupts import deferred, say
    from raybert.serve.deploy.launch import log_folder, read_state, serving
    from raybert.serve.deploy.status import watch

    say("interrupted; serving has ended")
    given = {"model": model, "host": host, "port": port, "keys": keys}
    experiment = load_experiment(config, overrides, name)
    serve_config = experiment.serve.changed(
        {key: value for key, value in given.items() if value is not None},
        model=experiment.folder.uri,
        registry=experiment.run.storage,
    )
    display = new_display()
    with (
        display.stage("serve"),
        serving(serve_config, experiment.ray, on_progress=display.progress) as url,
    ):
        display.print(f"serve     listening on {url}; API: {url}/docs; Ctrl-C stops it")
        log = log_folder()
        if log is not None:
            display.print(f"serve     log: {log}")
        if as_json:
            print_json({"url": url, "model": serve_config.model})
        try:
            with deferred() as stopping:
                watch(read_state, lambda line: display.print(f"serve     {line}"), stopping)
        except KeyboardInterrupt:
            display.print("serve     stopping; Ctrl-C again to stop at once")


@app.command()
def promote(
    registered: RegisteredArgument,
    model: ModelOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a model to the registry that serving reads, as the current version.

    Default of `--model`: the winner of `raybert tune`, else the experiment's fine-tuned model.

    Example: `raybert promote reviews -m runs/mine/tune`
    """
    from raybert.serve.runtime.model_sources import check_model
    from raybert.storage.registry import Registry, resolve_model

    experiment = load_experiment(config, overrides, name)
    if model is None:
        tuned = experiment.folder / "tune"
        stage = "tune" if tuned.exists("model/config.json") else "finetune"
        model = (experiment.folder / stage).uri
    registry = Registry(experiment.run.storage)
    folder = resolve_model(model)
    check_model(folder)  # servers would log the failure and keep the previous version
    version = registry.promote(registered, folder)
    _print_current(registry, registered, version, as_json)


@app.command()
def rollback(
    registered: RegisteredArgument,
    version: Annotated[
        int | None, typer.Option("--to", help="The version; default: the previous one.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an earlier version of a registered model current.

    Example: `raybert rollback reviews`
    """
    from raybert.storage.registry import Registry

    experiment = load_experiment(config, overrides)
    registry = Registry(experiment.run.storage)
    _print_current(registry, registered, registry.rollback(registered, version), as_json)


def _print_current(registry: Registry, name: str, version: int, as_json: bool) -> None:
    folder, versions = registry.folder(name, version), registry.versions(name)
    about = {"name": name, "version": version, "versions": versions, "model": folder.uri}
    text = f"{name}: version {version} of {len(versions)} is current: {folder}"
    print_result({**registry.describe(name, version), **about}, as_json, text)
