"""A visit to the connected cluster: ask, judge, tell. As a command, and as a run's first act."""

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
from raybert.jobs.doctor import all_reduce
from raybert.jobs.doctor import checks as judge
from raybert.jobs.doctor import nodes as asked
from raybert.jobs.doctor.checks import CheckResult
from raybert.jobs.estimate import shape_of, size_of, training_of, workers_of
from raybert.storage.folder import Folder
from raybert.terminal.display import Display
from raybert.train.ray.placement import uses_gpus
from raybert.train.run_folder import RESULT
from raybert.train.settings import TrainConfig

#: Set in a submitted job that is to be preceded by a visit: the versions of who submitted it.
CHECK = "RAYBERT_CHECK"
STAGES = ("pretrain", "finetune")
_VISITS = 3  # to a cluster whose nodes come and go


def check_request() -> dict[str, str]:
    """Return the environment of a job that begins with the checks."""
    return {CHECK: json.dumps(asked.versions())}


def run_checks(experiment: Experiment, display: Display) -> dict[str, Any]:
    """Visit the cluster that an experiment's configuration means, and show what is found.

    Returns:
        `findings`, and in `problem` the line of the first one that would stop a run, or None.
    """
    workers = max(workers_of(config) for config in _configs(experiment, STAGES))
    with display.stage("doctor"), ray_session(experiment.ray, workers) as resources:
        found = examine(experiment, resources, display, STAGES)
    for finding in found:
        display.say(f"{finding.status:<8} {finding.name:<17} {finding.line}")
    return {
        "findings": [dataclasses.asdict(finding) for finding in found],
        "problem": next(_problems(found), None),
    }


def run_requested_checks(
    experiment: Experiment, resources: Resources, display: Display, stages: Sequence[str]
) -> None:
    """Visit the connected cluster once where whoever submitted this job wants it.

    Raises:
        UserError: something would stop the run.
    """
    if CHECK not in os.environ:
        return
    found = examine(experiment, resources, display, stages)
    del os.environ[CHECK]  # a pipeline's stages are one job
    for finding in found:
        if finding.status == "warning":
            display.say(f"doctor    {finding.name}: {finding.line}")
    for problem in _problems(found):
        raise UserError(f"{problem} (submit with --no-check to try all the same)")
    display.say(f"doctor    no problem in {len(found)} checks")


def examine(
    experiment: Experiment, resources: Resources, display: Display, stages: Sequence[str]
) -> list[CheckResult]:
    """All that is found on the connected cluster for some stages of an experiment."""
    configs, storage = _configs(experiment, stages), Folder(experiment.run.storage)
    client = json.loads(os.environ.get(CHECK, "null"))
    # One worker meets nobody: then two processes on CPUs show whether nodes reach each other.
    meeting = [config for config in configs if workers_of(config) > 1]
    gpu = any(uses_gpus(config, resources.gpus) for config in meeting)
    count = max([2, *(workers_of(config) for config in meeting)])
    for _ in range(_VISITS):
        nodes = asked.alive()
        with all_reduce.peers(nodes, count, gpu) as peers:
            asked.ask(nodes, storage.uri, display.line)
            display.line(f"summing up over {len(peers)} processes")
            summed = all_reduce.reduce(peers, gpu)
        left = {node.id for node in asked.alive()}
        if all(node.id in left for node in nodes if node.error):
            break  # else a node died meanwhile: what counts is the cluster without it
    there = [node for node in nodes if not node.error]
    if not there:
        return [judge.of_nodes(nodes)]
    needed = [_needed(experiment, stage) for stage in stages]
    return [
        judge.of_nodes(nodes),
        judge.of_versions(there, client),
        judge.of_memory(there),
        judge.of_storage(there, str(storage)),
        judge.of_space(there, str(storage), None if None in needed else sum(filter(None, needed))),
        *(judge.of_cpus(config, resources) for config in configs),
        judge.of_reduction(summed),
        judge.of_clocks(there),
        judge.of_token(there, token.is_on()),
    ]


def _problems(found: Sequence[CheckResult]) -> Iterator[str]:
    return (f"{one.name}: {one.line}" for one in found if one.status == "problem")


def _configs(experiment: Experiment, stages: Sequence[str]) -> list[TrainConfig]:
    return [training_of(experiment, stage) for stage in stages]


def _needed(experiment: Experiment, stage: str) -> int | None:
    """Bytes that a stage's run has yet to write, at most; None where its model is not known."""
    run = experiment.folder / stage
    try:
        files = run.files()
    except (RaybertError, FileNotFoundError):  # said where the storage is looked at
        files = []
    if RESULT in {file.name for file in files}:
        return 0
    stored = size_of(experiment, stage, shape_of(experiment, stage))
    if stored is None:
        return None
    # However much a run has written, it writes a checkpoint before it deletes one.
    return max(stored.checkpoint, stored.total - sum(file.bytes for file in files))
