"""Run the checks on the connected cluster: as a command, and at the start of a submitted job."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from raybert.cluster import token
from raybert.cluster.session import Resources, ray_session
from raybert.errors import RaybertError, UserError
from raybert.experiment import Experiment
from raybert.jobs.doctor import all_reduce, checks
from raybert.jobs.doctor.checks import CheckResult
from raybert.jobs.doctor.nodes import alive_nodes, probe_nodes, versions
from raybert.jobs.estimate import estimate_storage, shape_of, training_of
from raybert.storage.folder import Folder
from raybert.terminal.display import Display
from raybert.train.ray.placement import uses_gpus
from raybert.train.run_folder import RESULT

#: Set in a submitted job that begins with the checks: the versions of the submitting machine.
CHECK = "RAYBERT_CHECK"
STAGES = ("pretrain", "finetune")
_ATTEMPTS = 3  # while nodes leave the cluster


def check_request() -> dict[str, str]:
    """Return the environment of a job that begins with the checks."""
    return {CHECK: json.dumps(versions())}


def run_checks(experiment: Experiment, display: Display) -> dict[str, Any]:
    """Check the cluster of an experiment and show the results.

    Returns `findings`, the results, and `problem`, the line of the first that would stop a run.
    """
    workers = max(training_of(experiment, stage).max_workers for stage in STAGES)
    with display.stage("doctor"), ray_session(experiment.ray, workers) as resources:
        results = check_cluster(experiment, resources, display, STAGES)
    for result in results:
        display.print(f"{result.status:<8} {result.name:<17} {result.line}")
    return {
        "findings": [dataclasses.asdict(result) for result in results],
        "problem": next(_problems(results), None),
    }


def run_requested_checks(
    experiment: Experiment, resources: Resources, display: Display, stages: Sequence[str]
) -> None:
    """Check the cluster once if this job was submitted with checks; UserError: a problem."""
    if CHECK not in os.environ:
        return
    results = check_cluster(experiment, resources, display, stages)
    del os.environ[CHECK]  # the stages of `raybert run` are one job
    for result in results:
        if result.status == "warning":
            display.print(f"doctor    {result.name}: {result.line}")
    for problem in _problems(results):
        raise UserError(f"{problem} (submit with --no-check to run without the checks)")
    display.print(f"doctor    no problem in {len(results)} checks")


def check_cluster(
    experiment: Experiment, resources: Resources, display: Display, stages: Sequence[str]
) -> list[CheckResult]:
    """Return the results of all checks for some stages of an experiment."""
    configs = [training_of(experiment, stage) for stage in stages]
    storage = Folder(experiment.run.storage)
    client = json.loads(os.environ.get(CHECK, "null"))
    # One worker needs no network: then two processes on CPUs test the connection of the nodes.
    parallel = [config for config in configs if config.max_workers > 1]
    gpu = any(uses_gpus(config, resources.gpus) for config in parallel)
    count = max([2, *(config.max_workers for config in parallel)])
    for _ in range(_ATTEMPTS):
        nodes = alive_nodes()
        with all_reduce.start_processes(nodes, count, gpu) as processes:
            probe_nodes(nodes, storage.uri, display.progress)
            display.progress(f"all-reduce over {len(processes)} processes")
            reduced = all_reduce.run_all_reduce(processes, gpu)
        alive = {node.id for node in alive_nodes()}
        if all(node.id in alive for node in nodes if node.error):
            break  # otherwise a node died during the checks: repeat them without it
    working = [node for node in nodes if not node.error]
    if not working:
        return [checks.check_nodes(nodes)]
    needed = [_needed_bytes(experiment, stage) for stage in stages]
    total = None if None in needed else sum(filter(None, needed))
    return [
        checks.check_nodes(nodes),
        checks.check_versions(working, client),
        checks.check_memory(working),
        checks.check_storage(working, str(storage)),
        checks.check_space(working, str(storage), total),
        *(checks.check_workers(config, resources) for config in configs),
        checks.check_all_reduce(reduced),
        checks.check_clocks(working),
        checks.check_token(working, token.is_on()),
    ]


def _problems(results: Sequence[CheckResult]) -> Iterator[str]:
    return (f"{result.name}: {result.line}" for result in results if result.status == "problem")


def _needed_bytes(experiment: Experiment, stage: str) -> int | None:
    """Return the bytes that a stage has yet to write, at most; None where its model is unknown."""
    try:
        files = (experiment.folder / stage).files()
    except (RaybertError, FileNotFoundError):  # the storage check reports it
        files = []
    if RESULT in {file.name for file in files}:
        return 0
    stored = estimate_storage(experiment, stage, shape_of(experiment, stage))
    if stored is None:
        return None
    # A run writes a checkpoint before it deletes an old one, however much it has written.
    return max(stored.checkpoint, stored.total - sum(file.bytes for file in files))
