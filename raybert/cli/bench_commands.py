"""Commands that measure raybert on this machine: bench train, bench serve."""

from __future__ import annotations

from typing import Annotated

import typer

from raybert.cli.options import (
    ConfigOption,
    InProcessOption,
    JsonOption,
    ModelOption,
    NameOption,
    SetOption,
    load_experiment,
    load_model_folder,
    new_display,
    print_result,
)
from raybert.records import metric_of

app = typer.Typer(help="Measure raybert on this machine.", no_args_is_help=True)


@app.command("train")
def bench_train(
    config: ConfigOption = None,
    overrides: SetOption = None,
    in_process: InProcessOption = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Training workers.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per worker.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the training loop on generated words, under Ray or in this process.

    Example: `raybert bench train -c configs/bench-keras.yaml --workers 2 --threads 1`
    """
    from raybert.pipeline import benchmarks

    given = {"pretrain.workers": workers, "pretrain.threads": threads}
    more = [f"{key}={value}" for key, value in given.items() if value is not None]
    experiment = load_experiment(config, [*(overrides or []), *more], None)
    result = benchmarks.bench_train(experiment, in_process=in_process, display=new_display())
    speed = f"{result['tokens_per_second']:,.0f} tokens/s over {result['steps']} steps"
    print_result(result, as_json, speed)


@app.command("serve")
def bench_serve(
    model: ModelOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    texts: Annotated[int, typer.Option(min=1, help="Evaluation texts, at most.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Measure speed and score of each precision; store the best one with the model.

    Example: `raybert bench serve -m runs/mine --set evaluate.source.path=test.csv`
    """
    from raybert.pipeline import benchmarks
    from raybert.tasks.registry import read_task

    experiment = load_experiment(config, overrides, name)
    folder = load_model_folder(model, experiment)
    result = benchmarks.bench_serve(experiment, folder, texts, new_display())
    stored = "stored with the model" if result["stored"] else "not stored: the model is read-only"
    metric, task = metric_of(result), read_task(folder)[0]
    unit = "points" if task.selection_metrics.get(metric, True) else "%"
    lines = [
        f"{precision:<10}{found['texts_per_second']:>10,.1f} texts/s  "
        f"{metric} {found[metric]:.4f} ({0.0 - found['points_lost']:+.2f} {unit})"
        for precision, found in result["measured"].items()
    ]
    if not result["stable"]:
        lines.append("the times differ much: other work runs on this machine; measure again")
    lines.append(f"{result['precision']} for {result['machine']}: {stored}")
    print_result(result, as_json, "\n".join(lines))
