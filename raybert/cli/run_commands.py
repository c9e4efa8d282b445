"""Commands for stored experiments: runs ls, runs rm."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated

import typer

from raybert.cli.options import ConfigOption, JsonOption, load_experiment, new_display, print_json
from raybert.errors import UserError

if TYPE_CHECKING:
    from raybert.pipeline.runs import Stage
    from raybert.storage.folder import Folder

app = typer.Typer(help="The experiments in a storage.", no_args_is_help=True)

StorageOption = Annotated[
    str | None, typer.Option("--storage", help="A folder or URI; default: run.storage.")
]


@app.command("ls")
def list_runs(
    storage: StorageOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """List the experiments of a storage with the state and size of each stage.

    Example: `raybert runs ls --storage s3://bucket/runs`
    """
    from raybert.pipeline import runs
    from raybert.terminal.formats import escape_controls, size

    folder = _storage(storage, config)
    found = runs.list_runs(folder)
    if as_json:
        listed = [dataclasses.asdict(run) for run in found]
        print_json({"storage": folder.uri, "runs": listed})
        return
    for run in found:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        print(f"{escape_controls(run.name):<20} {size(run.bytes):>8}  {changed}")
        for stage in run.stages:
            print(f"  {stage.name:<18} {size(stage.bytes):>8}  {_format_stage(stage)}")
    if not found:
        new_display().print(f"{folder} has no experiments")


@app.command("rm")
def remove_run(
    name: Annotated[str, typer.Argument(help="The experiment's name.")],
    storage: StorageOption = None,
    config: ConfigOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    force: Annotated[bool, typer.Option(help="Delete it even while in use.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete an experiment with its corpus, checkpoints and models, after confirmation.

    Example: `raybert runs rm mine --storage s3://bucket/runs`
    """
    from raybert.pipeline import runs
    from raybert.terminal.formats import size

    folder = _storage(storage, config)
    run = runs.find_run(folder, name)
    if not force:
        runs.check_idle(folder, run)
    stages = ", ".join(f"{stage.name} ({stage.state})" for stage in run.stages)
    what = f"{folder.join(name)}: {stages or 'nothing'}; {size(run.bytes)}"
    confirmed = yes or _confirm(what)
    if confirmed:
        folder.delete(run.name)
    new_display().print(f"deleted {what}" if confirmed else "nothing deleted")
    if as_json:
        print_json({"name": name, "deleted": confirmed, "bytes": run.bytes})


def _confirm(what: str) -> bool:
    """Ask for confirmation, on standard error: standard output is for the result."""
    try:
        return typer.confirm(f"Delete {what}?", err=True)
    except typer.Abort:
        raise UserError(f"{what} is not deleted: no answer on standard input; pass --yes") from None


def _storage(storage: str | None, config: ConfigOption) -> Folder:
    from raybert.storage.folder import Folder

    return Folder(storage or load_experiment(config, None).run.storage)


def _format_stage(stage: Stage) -> str:
    if stage.problem is not None:
        return f"{stage.state}: {stage.problem}"
    steps = "" if stage.step is None else f" step {stage.step:,}"
    steps += f"/{stage.total_steps:,}" if stage.total_steps and stage.state != "finished" else ""
    figures = "".join(
        f", {key} {value:,}" if isinstance(value, int) else f", {key} {value:.4f}"
        for key, value in stage.figures.items()
    )
    attempts = f", {stage.attempts} attempts" if stage.attempts > 1 else ""
    return f"{stage.state}{steps}{figures}{attempts}"
