"""Commands of the model registry: promote, rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raybert.cli.options import (
    ConfigOption,
    JsonOption,
    ModelOption,
    NameOption,
    SetOption,
    load_experiment,
    print_json,
)

if TYPE_CHECKING:
    from raybert.storage.registry import Registry

app = typer.Typer()

NameArgument = Annotated[str, typer.Argument(help="The model's name in the registry.")]


@app.command()
def promote(
    registered: NameArgument,
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
    registered: NameArgument,
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
    if as_json:
        about = {"name": name, "version": version, "versions": versions, "model": folder.uri}
        print_json({**registry.describe(name, version), **about})
    else:
        print(f"{name}: version {version} of {len(versions)} is current: {folder}")
