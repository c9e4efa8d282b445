"""The command that a newcomer begins with: init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from raybert.cli.options import JsonOption, LabelColumnOption, NameOption, print_result

app = typer.Typer()


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="Texts: a file, a folder, a glob or a URI.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The configuration to write; default: NAME.yaml."),
    ] = None,
    name: NameOption = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", help="Column of the texts; default: found out.")
    ] = None,
    label_column: LabelColumnOption = None,
    test: Annotated[
        str | None,
        typer.Option("--test", help="Labelled texts to evaluate on; default: some are held out."),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Whether to look for labels.")
    ] = True,
    force: Annotated[bool, typer.Option(help="Overwrite a configuration that exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at your texts, say what was found, and write a short configuration for them.

    Example: `raybert init tickets.csv`, then `raybert run -c tickets.yaml`
    """
    from raybert.config import build
    from raybert.data.sources import documents
    from raybert.data.sources.settings import EvaluationSource, SourceConfig

    given: dict[str, Any] = {"path": data}
    if text_column is not None:
        given["text_column"] = text_column
    if label_column:
        given["label_column"] = label_column[0] if len(label_column) == 1 else label_column
    source = build(SourceConfig, given, "")
    for each in (source, *([EvaluationSource(path=test)] if test is not None else [])):
        documents.shards(each)  # a missing file is an error before PyTorch is imported
    from raybert.pipeline.init_stage import init as look

    found = look(source, output, test=test, name=name, force=force, wants_labels=labels)
    lines = found.pop("lines")
    print_result(found, as_json, None if as_json else "\n".join(lines))
