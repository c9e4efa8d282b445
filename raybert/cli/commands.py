"""The table of commands, and the exit code of each error. Heavy imports stay inside commands."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from raybert import __version__
from raybert.cli import (
    bench_commands,
    exchange_commands,
    job_commands,
    model_commands,
    run_commands,
    stage_commands,
    start_commands,
)
from raybert.cli.options import (
    ConfigOption,
    FromOption,
    JsonOption,
    SetOption,
    load_experiment,
    print_result,
)
from raybert.cluster import interrupts
from raybert.errors import (
    INTERRUPTED,
    DamagedError,
    RaybertError,
    StorageError,
    UserError,
    printable,
)

# Errors that a user can correct: the input, the storage, a damaged file. They exit with 2.
_USER_ERRORS = (UserError, StorageError, DamagedError)
INTERRUPTED_MESSAGE = "interrupted; run the same command again to resume"
_DEBUG = bool(os.environ.get("RAYBERT_DEBUG"))

app = typer.Typer(
    name="raybert",
    help="Pretrain a BERT on your own text and fine-tune it into a classifier, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(start_commands.app)
app.add_typer(stage_commands.app)
app.add_typer(model_commands.app)
app.add_typer(exchange_commands.app)
app.add_typer(run_commands.app, name="runs")
app.add_typer(job_commands.app)
app.add_typer(bench_commands.app, name="bench")


def main() -> None:
    """Run the command line: a user's mistake ends with one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer's usual exit
            raise
        _print_error(interrupts.say("") or INTERRUPTED_MESSAGE)
        sys.exit(INTERRUPTED)
    except RaybertError as error:
        if _DEBUG:
            raise
        _print_error(str(error))
        sys.exit(2 if isinstance(error, _USER_ERRORS) else 1)
    except OSError as error:
        if _DEBUG or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _print_error(f"{error.filename or 'writing'}: {error.strerror}; free some space and rerun")
        with suppress(OSError):  # its buffer cannot be written either
            sys.stdout.close()
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"raybert {__version__}")
        raise typer.Exit()


@app.callback()
def set_debug(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print raybert's version."
        ),
    ] = False,
) -> None:
    """Show tracebacks of errors that end in one line otherwise."""
    global _DEBUG
    _DEBUG = _DEBUG or debug


@app.command("config")
def show_config(
    config: ConfigOption = None,
    overrides: SetOption = None,
    start: FromOption = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema instead.")
    ] = False,
    commented: Annotated[
        bool, typer.Option("--commented", help="Write what each key means above it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved configuration, or the JSON schema for editors.

    What `model.size` decides is in comments, unless it is set.

    Examples: `raybert config --commented > mine.yaml`,
    `raybert config --schema > raybert.schema.json`
    """
    from raybert.config import comment_out, dump, flatten, read_values
    from raybert.experiment import Experiment
    from raybert.model.sizes import DECIDED

    if schema:
        found = Experiment.model_json_schema()
        print_result(found, as_json, json.dumps(found, indent=2))
        return
    experiment = load_experiment(config, overrides, None, start=start, command="config")
    if as_json:
        print_result(experiment.model_dump(mode="json"), as_json)
        return
    decided = {f"{section}.{key}" for section, keys in DECIDED.items() for key in keys}
    given = dict(flatten(read_values(config, overrides or ())))
    left_open = decided - given.keys() if start is None else set()
    if commented:
        from raybert.cli.commented_config import dump_commented

        text = dump_commented(experiment)
    else:
        text = dump(experiment)
    print(comment_out(text, left_open), end="")


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the versions of raybert and its dependencies."""
    from raybert.jobs.doctor.nodes import versions

    found = versions()
    print_result(found, as_json, "\n".join(" ".join(item) for item in found.items()))


def _print_error(text: str) -> None:
    print(f"raybert: {printable(text, None)}", file=sys.stderr)
