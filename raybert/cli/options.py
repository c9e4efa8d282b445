"""Options that commands share; reading the configuration and printing the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
) -> Experiment:
    """Read the configuration and apply `--data` and columns, then `--set`, then `--name`."""
    from raybert.config import load
    from raybert.experiment import DATA_KEYS, LABEL_KEYS, TEXT_KEYS, Experiment

    label: Any = label_column[0] if label_column and len(label_column) == 1 else label_column
    options = {
        "--data": _assign(DATA_KEYS, data),
        "--text-column": _assign(TEXT_KEYS, text_column),
        "--label-column": _assign(LABEL_KEYS, label),
        "--set": overrides or [],
        "--name": _assign(("run.name",), name),
    }
    return load(
        Experiment,
        path,
        [override for given in options.values() for override in given],
        options=", ".join(option for option, given in options.items() if given),
    )


def _assign(keys: Sequence[str], value: Any) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key in keys] if value is not None else []


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
        print(text)


def load_model_folder(path: str | None, experiment: Experiment, stage: str = "finetune") -> Folder:
    """Find the `model/` directory of `--model`, or that of the experiment's stage."""
    from raybert.storage.registry import resolve_model

    if path is None:
        return resolve_model((experiment.folder / stage).uri)
    return resolve_model(path, stage)
