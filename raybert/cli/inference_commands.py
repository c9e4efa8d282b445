"""Commands that apply a model: predict, fill-mask."""

from __future__ import annotations

import io
import sys
from typing import Annotated, cast

import typer

from raybert.cli.options import (
    ConfigOption,
    JsonOption,
    ModelOption,
    NameOption,
    SetOption,
    load_experiment,
    load_model_folder,
    new_display,
    print_json,
    print_result,
)
from raybert.errors import UserError

app = typer.Typer()


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: lines of stdin.")] = None,
    model: ModelOption = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help="A file of texts, read through Ray Data.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="With --input: a .jsonl or .parquet file.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line; the default.")
    ] = False,
) -> None:
    """Classify texts: arguments, lines of standard input, or files through Ray Data.

    Prints one JSON object a line; `row` is the index of the text's line or argument, from 0.

    Examples: `raybert predict -m runs/mine "A joy."`,
    `raybert predict -m runs/mine -i reviews.parquet -o labels.jsonl`
    """
    from raybert.pipeline import predict_stage

    experiment = load_experiment(config, overrides, name)
    folder = load_model_folder(model, experiment)
    if source is not None:
        if output is None:
            raise UserError("--input needs --output: name a .jsonl or a .parquet file")
        print_json(predict_stage.predict_file(experiment, folder, source, output, new_display()))
        return
    for number, text in enumerate(texts or [], 1):
        if not text.strip():
            raise UserError(f"text {number} is empty; remove it, or write a text")
    stdin = cast(io.BufferedReader, sys.stdin.buffer)
    batches = predict_stage.number_texts(texts) if texts else predict_stage.read_lines(stdin)
    row = None
    for row in predict_stage.predict_texts(folder, batches, experiment.serve.precision):
        print_json(row)
    if row is None:
        raise UserError("standard input has no text; pass one text a line, or texts as arguments")


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
    from raybert.pipeline import predict_stage

    experiment = load_experiment(config, overrides, name)
    found = predict_stage.fill_mask(load_model_folder(model, experiment, "pretrain"), text, top)
    if as_json:
        print_result({"text": text, "masks": found}, as_json)
    else:
        for number, guesses in enumerate(found, 1):
            for guess in guesses:
                print(f"{number}  {guess['probability']:.4f}  {guess['token']}")
