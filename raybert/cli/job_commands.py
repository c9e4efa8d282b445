"""Commands for clusters: estimate, doctor, submit, jobs, logs, stop."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated, Any

import typer

from raybert.cli.options import (
    ConfigOption,
    DataOption,
    JsonOption,
    LabelColumnOption,
    NameOption,
    SetOption,
    TextColumnOption,
    load_experiment,
    new_display,
    print_result,
)
from raybert.errors import UserError

app = typer.Typer()

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", "-a", help="Ray's dashboard, http://HEAD:8265; or RAY_API_SERVER_ADDRESS."
    ),
]
RunArgument = Annotated[str, typer.Argument(help="A run's name, or a job's id.")]


@app.command()
def doctor(
    address: AddressOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a cluster for an experiment: nodes, storage, space, network, token; or this machine.

    Example: `raybert doctor --address http://head:8265 -c mine.yaml`
    """
    from raybert.jobs.doctor.run_checks import run_checks
    from raybert.jobs.ray_jobs import Cluster
    from raybert.jobs.submit import diagnose
    from raybert.terminal.display import FOLLOWED

    experiment, display = load_experiment(config, overrides, name), new_display()
    if address is None:
        found = run_checks(experiment, display)
    else:
        found = diagnose(Cluster(address), experiment, display)
    print_result(found, as_json)
    if found["problem"] is not None:
        if FOLLOWED in os.environ:  # the process that follows this job prints it
            sys.exit(2)
        raise UserError(found["problem"])


@app.command()
def estimate(
    stage: Annotated[str, typer.Argument(help="pretrain or finetune.")] = "pretrain",
    config: ConfigOption = None,
    overrides: SetOption = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, each with a worker.")] = 8,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their type.")] = "H100",
    network: Annotated[float, typer.Option(min=0.1, help="Gb/s of a node's network.")] = 3200,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate storage, steps and time of training on GPUs, and what limits it; reads no cluster.

    Example: `raybert estimate pretrain -c mine.yaml --gpus 64 --gpu H200`
    """
    from raybert.jobs.scaling import estimate_on

    experiment = load_experiment(config, overrides, name)
    found = estimate_on(experiment, stage, gpus, gpus_per_node, gpu, network)
    print_result(found, as_json, "\n".join(found["lines"]))


@app.command()
def submit(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="corpus, pretrain, finetune, tune, run, ...")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Further arguments of that command, after `--`.")
    ] = None,
    address: AddressOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    data: DataOption = None,
    text_column: TextColumnOption = None,
    label_column: LabelColumnOption = None,
    wait: Annotated[bool, typer.Option(help="Follow the job and exit with its code.")] = True,
    checks: Annotated[
        bool, typer.Option("--check/--no-check", help="Check the cluster first.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Run a command on a cluster and follow it; submitting again follows or resumes the run.

    Example: `raybert submit pretrain --address http://head:8265 -c mine.yaml`
    """
    from raybert.jobs.ray_jobs import Cluster
    from raybert.jobs.submit import check, follow
    from raybert.jobs.submit import submit as send

    experiment = load_experiment(
        config, overrides, name, data, text_column=text_column, label_column=label_column
    )
    check(experiment, command, _parse_arguments(context, command, arguments or []))
    cluster, display = Cluster(address), new_display()
    job = send(cluster, command, experiment, arguments or [], display, checks=checks)
    if not wait:
        print_result(dataclasses.asdict(job), as_json)
        return
    ended = follow(cluster, job, display)
    print_result(ended, as_json)
    sys.exit(ended["exit_code"])


@app.command()
def jobs(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """List the jobs that raybert submitted to a cluster.

    Example: `raybert jobs --address http://head:8265`
    """
    from raybert.jobs.ray_jobs import Cluster

    found = Cluster(address).jobs()
    lines = [f"{job.status:<10} {job.run:<20} {job.command:<10} {job.id}" for job in found]
    result = {"jobs": [dataclasses.asdict(job) for job in found]}
    print_result(result, as_json, "\n".join(lines) if found else None)


@app.command()
def logs(
    run: RunArgument,
    address: AddressOption = None,
    wait: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Follow the job until it ends.")
    ] = True,
) -> None:
    """Print the output of a run's job, and follow it until it ends.

    Example: `raybert logs mine --address http://head:8265`
    """
    from raybert.jobs.ray_jobs import Cluster
    from raybert.jobs.submit import follow
    from raybert.terminal.display import printable_log

    cluster = Cluster(address)
    job = cluster.latest(run)
    if not (wait and job.is_alive):
        print(printable_log(cluster.logs(job)), end="")
        return
    sys.exit(follow(cluster, job, new_display())["exit_code"])


@app.command()
def stop(run: RunArgument, address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Stop a run's job after a checkpoint; submitting it again resumes from there.

    Example: `raybert stop mine --address http://head:8265`
    """
    from raybert.jobs.ray_jobs import Cluster

    cluster = Cluster(address)
    job = cluster.latest(run)
    stopped = cluster.stop(job)
    text = f"{job.id} {'is stopping' if stopped else 'has already ended'}"
    print_result({"job": job.id, "stopped": stopped}, as_json, text)


def _parse_arguments(context: typer.Context, command: str, arguments: list[str]) -> dict[str, Any]:
    """Parse the arguments of the submitted command, so that a mistake in them fails here."""
    root = context.find_root().command
    known = root.get_command(context, command) if isinstance(root, typer.core.TyperGroup) else None
    if known is None:
        return {}
    return dict(known.make_context(f"raybert {command}", list(arguments)).params)
