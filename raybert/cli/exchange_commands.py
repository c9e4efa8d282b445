"""Commands that give a model or a run to others: export, push, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from raybert.cli.options import JsonOption, new_display, print_result

app = typer.Typer()


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A `model/` folder, a run or an experiment.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    format: Annotated[Literal["onnx"], typer.Option(help="What to write.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Write a quantized graph beside it, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a classifier as an ONNX graph, and measure it beside PyTorch on its validation texts.

    Example: `raybert export runs/mine --int8 -o mine-onnx`
    """
    from raybert.storage.registry import resolve_model

    folder = resolve_model(model)
    from raybert.pipeline.export_stage import export_onnx, format_export

    result = export_onnx(folder, output, new_display(), int8=int8)
    print_result(result, as_json, None if as_json else format_export(result))


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="A `model/` folder, a run or an experiment.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on huggingface.co.")],
    public: Annotated[
        bool,
        typer.Option("--public", help="Make a new repository public, or write to a public one."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes; upload nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a model with its card to the Hugging Face Hub, to a private repository by default.

    Example: `raybert push runs/mine me/my-model --dry-run`
    """
    from raybert.storage.registry import resolve_model

    folder = resolve_model(model)
    from raybert.pipeline.push_stage import format_push
    from raybert.pipeline.push_stage import push as upload

    result = upload(folder, repository, new_display(), public=public, dry_run=dry_run)
    print_result(result, as_json, None if as_json else format_push(result))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs or experiments, two or more.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A page to write, with all curves.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: their scores, with intervals where both were evaluated on the same texts.

    Example: `raybert compare runs/mine runs/larger -o compare.html`
    """
    from raybert.cli.stage_commands import format_table
    from raybert.errors import UserError
    from raybert.report.comparison import compare_pairs, read_runs, render_comparison, score_table
    from raybert.report.page import check_report
    from raybert.storage.folder import Folder

    if len(runs) < 2:
        raise UserError(f"compare {' '.join(runs)}: name two runs or more")
    found = read_runs([Folder(run) for run in runs])
    if output is not None:
        check_report()
    pairs = compare_pairs(found)
    if output is not None:
        folder, name = Folder.of_file(output)
        folder.write_text(name, render_comparison(found, pairs, with_curves=True))
    table = score_table(found)
    rows = [list(map(str, row)) for row in table.rows]
    lines = [format_table([table.head, *rows]), *(pair.describe() for pair in pairs)]
    result = {
        "runs": {run.name: run.values for run in found},
        "differences": [
            {
                "first": pair.first,
                "second": pair.second,
                "metric": pair.metric,
                "difference": pair.difference and pair.difference._asdict(),
                "texts": pair.texts,
                "problem": pair.problem or None,
            }
            for pair in pairs
        ],
        "page": output,
    }
    print_result(result, as_json, None if as_json else "\n".join([*lines, *filter(None, [output])]))
