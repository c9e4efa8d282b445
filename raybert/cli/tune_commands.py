"""The command of the search: tune."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from raybert.cli.options import (
    ConfigOption,
    DataOption,
    JsonOption,
    NameOption,
    SetOption,
    load_experiment,
    new_display,
    print_json,
)

app = typer.Typer()


@app.command()
def tune(
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Sets tune.trials.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes of the search; sets tune.minutes.")
    ] = None,
    dashboard: Annotated[
        bool,
        typer.Option("--dashboard", help="Serve Ray's and TensorBoard's pages meanwhile."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Search fine-tuning hyperparameters. Running the same name again resumes the search.

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
        print(_format_result(result))


def _format_result(result: dict[str, Any]) -> str:
    """Format the winner's scores beside those of the configured values."""
    best, default = result["best"], result["default"]
    lines = [f"{'':<22}{'validation accuracy':<28}values"]
    for title, found in (("winner", best), ("configured values", default)):
        if found is not None:
            lines.append(f"{title:<22}{_format_spread(found):<28}{json.dumps(found['config'])}")
    if "test" in result:
        lines.append(
            f"{'winner on the test':<22}{result['test']['accuracy']:.4f} "
            f"({result['test']['n']:,} texts)"
        )
    lines += ["", f"Model: {result['model']}", f"Configuration: {result['config']}"]
    if result.get("report"):
        lines.append(f"Report: {result['report']}")
    return "\n".join(lines)


def _format_spread(found: dict[str, Any]) -> str:
    spread = found["seeds"]["accuracy"]
    if spread["mean"] is None:
        return "none"
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.4f}"
    return f"{spread['mean']:.4f}{deviation}, {found['seeds']['n']} seeds"
