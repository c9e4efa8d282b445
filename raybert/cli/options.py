"""Options that commands share; reading the configuration and printing the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from raybert.experiment import Experiment
    from raybert.storage.folder import Folder
    from raybert.terminal.display import Display

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The experiment's YAML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a key: `--set pretrain.lr=3e-4`. Repeatable."),
]
NameOption = Annotated[
    str | None, typer.Option("--name", "-n", help="The experiment's name; the same one resumes.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Texts for every stage: sets all `source.path` keys."),
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Start from a published encoder: a folder of BERT's or ModernBERT's family, a run, or "
        "a name on huggingface.co; to fine-tune, of RoBERTa, DeBERTa and others, too.",
    ),
]
TextColumnOption = Annotated[
    str | None,
    typer.Option("--text-column", help="Column of the texts: sets all `source.text_column` keys."),
]
LabelColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label-column",
        help="Column of the labels: sets `source.label_column` keys. Several: repeat it.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A `model/` folder, a run or an experiment.")
]
InProcessOption = Annotated[
    bool, typer.Option("--bare", help="Train in this process, without Ray: to debug, to measure.")
]


def load_experiment(
    path: Path | None,
    overrides: list[str] | None,
    name: str | None = None,
    data: str | None = None,
    *,
    text_column: str | None = None,
    label_column: list[str] | None = None,
    reads: Sequence[str] = (),
    run: str = "finetune",
    start: str | None = None,
    command: str = "run",
) -> Experiment:
    """Read the configuration and apply `--data` and columns, then `--set`, then `--name`.

    The sources of the stages in `reads` are looked at first, since the import of the configuration
    takes seconds, with PyTorch; `run` is the folder of the fine-tuning. `start` is what `--from` of
    a command names.
    """
    from raybert.config import load, read_values
    from raybert.pipeline.published import find_encoder, format_overruled, with_encoder

    columns = label_column or None  # an option that is not given may be an empty list
    label: Any = columns[0] if columns and len(columns) == 1 else columns
    options = {
        "--data": _assign("path", _STAGES, data),
        "--text-column": _assign("text_column", _STAGES, text_column),
        "--label-column": _assign("label_column", _STAGES[1:], label),
        "--set": overrides or [],
        "--name": [] if name is None else [f"run.name={json.dumps(name)}"],
    }
    given = [override for some in options.values() for override in some]
    if reads:
        from raybert.pipeline import preflight

        preflight.check_sources(read_values(path, given), reads, run)
    encoder = None if start is None else find_encoder(start)
    with _loading():
        from raybert.experiment import Experiment

    names = ", ".join(option for option, some in options.items() if some)
    if encoder is None:
        return load(Experiment, path, given, options=names)
    overruled: list[str] = []

    def adapt(values: dict[str, Any]) -> dict[str, Any]:
        started, found = with_encoder(values, encoder, command)
        overruled.extend(found)
        return started

    experiment = load(Experiment, path, given, options=names or "--from", adapt=adapt)
    if overruled:
        new_display().print(format_overruled(overruled, encoder))
    return experiment


@contextmanager
def _loading() -> Iterator[None]:
    """Show on a terminal what takes the first seconds."""
    is_shown = sys.stderr.isatty()
    if is_shown:
        print("\r\x1b[2Kloading PyTorch", end="", file=sys.stderr, flush=True)
    yield
    if is_shown:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


_STAGES = ("corpus", "finetune", "evaluate")


def _assign(key: str, stages: Sequence[str], value: Any) -> list[str]:
    """The overrides that set a key of the sources of stages."""
    if value is None:
        return []
    return [f"{stage}.source.{key}={json.dumps(value)}" for stage in stages]


def check_model(path: str | None) -> None:
    """Raise UserError if `--model` names no model, before PyTorch is imported."""
    from raybert.storage.registry import resolve_model

    if path is not None:
        resolve_model(path)


def new_display() -> Display:
    """Create the progress display, on standard error; its heavy imports happen here."""
    from raybert.terminal.display import Display

    return Display()


def print_json(result: Any) -> None:
    """Print a result as one line of JSON; NaN and infinities become null."""
    from raybert.records import finite

    text = json.dumps(finite(result), ensure_ascii=False, allow_nan=False, default=str)
    print(text, flush=True)


def print_result(result: Any, as_json: bool, text: str | None = None) -> None:
    """Print a result as JSON with `--json`; otherwise `text`, None: the display has shown it."""
    if as_json:
        print_json(result)
    elif text is not None:
        from raybert.terminal.formats import escape_controls

        print(escape_controls(text))


def load_model_folder(path: str | None, experiment: Experiment, stage: str = "finetune") -> Folder:
    """Find the `model/` directory of `--model`, or that of the experiment's stage."""
    from raybert.storage.registry import resolve_model

    if path is None:
        return resolve_model((experiment.folder / stage).uri)
    return resolve_model(path, stage)
