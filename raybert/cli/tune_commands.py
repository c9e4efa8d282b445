"""The command line's part about choosing: tune, and the registry's promote and rollback."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

if TYPE_CHECKING:
    from raybert.storage.registry import Registry

app = typer.Typer()

NameArgument = Annotated[str, typer.Argument(help="The model's name in the registry.")]


@app.command()
def tune(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many; sets tune.trials.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Of the search; sets tune.minutes.")
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Show Ray's and TensorBoard's pages meanwhile.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Search for the best fine-tuning. Running the same name again goes on with it.

    Example: `raybert tune -c configs/tune.yaml --trials 40 --minutes 120`
    """
    from raybert.pipeline.tune_stage import tune as search

    given = {"tune.trials": trials, "tune.minutes": minutes}
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    experiment = load_experiment(config, [*(overrides or []), *more], name, data)
    result = search(experiment, new_display(), dashboard=dashboard)
    if as_json:
        print_json(result)
    else:
        print(_told(result))


@app.command()
def promote(
    registered: NameArgument,
    model: ModelOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a model into the registry that serving reads, and make it the current one.

    Without `--model` it is the experiment's winner of `raybert tune`, else its fine-tuned model.

    Example: `raybert promote reviews -m runs/mine/tune`
    """
    from raybert.serve.runtime.loaded_model import check
    from raybert.storage.model_folders import resolve_model
    from raybert.storage.registry import Registry

    experiment = load_experiment(config, overrides, name)
    if model is None:
        tuned = experiment.folder / "tune"
        stage = "tune" if tuned.exists("model/config.json") else "finetune"
        model = (experiment.folder / stage).uri
    registry = Registry(experiment.run.storage)
    folder = resolve_model(model)
    check(folder)  # what serves would go on with the version before, and tell it in a log only
    version = registry.promote(registered, folder)
    _show(registry, registered, version, as_json)


@app.command()
def rollback(
    registered: NameArgument,
    version: Annotated[
        int | None, typer.Option("--to", help="The version; default: the one before.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an earlier version of a registered model the current one.

    Example: `raybert rollback reviews`
    """
    from raybert.storage.registry import Registry

    experiment = load_experiment(config, overrides)
    registry = Registry(experiment.run.storage)
    _show(registry, registered, registry.rollback(registered, version), as_json)


def _show(registry: Registry, name: str, version: int, as_json: bool) -> None:
    folder, versions = registry.folder(name, version), registry.versions(name)
    if as_json:
        about = {"name": name, "version": version, "versions": versions, "model": folder.uri}
        print_json({**registry.describe(name, version), **about})
    else:
        print(f"{name}: version {version} of {len(versions)} is the current one: {folder}")


def _told(result: dict[str, Any]) -> str:
    """The result, for people: the winner beside the configured values."""
    best, default = result["best"], result["default"]
    lines = [f"{'':<22}{'validation accuracy':<28}values"]
    for title, found in (("winner", best), ("configured values", default)):
        if found is not None:
            lines.append(f"{title:<22}{_spread(found):<28}{json.dumps(found['config'])}")
    if "test" in result:
        lines.append(
            f"{'winner on the test':<22}{result['test']['accuracy']:.4f} "
            f"({result['test']['n']:,} texts)"
        )
    lines += ["", f"Model: {result['model']}", f"Configuration: {result['config']}"]
    if result.get("report"):
        lines.append(f"Report: {result['report']}")
    return "\n".join(lines)


def _spread(found: dict[str, Any]) -> str:
    spread = found["seeds"]["accuracy"]
    if spread["mean"] is None:
        return "none"
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.4f}"
    return f"{spread['mean']:.4f}{deviation}, {found['seeds']['n']} seeds"
