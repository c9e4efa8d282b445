"""Submitting a stage to a cluster: what is looked at first, and what is told on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from raybert.display import FOLLOWED, Display, clock
from raybert.errors import ConfigError
from raybert.experiment import Experiment
from raybert.jobs import Cluster, Job, result_of
from raybert.text.sources import SourceConfig

#: The commands that may be submitted, and the keys of what each reads from outside its storage.
READS = {
    "corpus": ("corpus.source", "corpus.overlap", "corpus.tokenizer.path"),
    "pretrain": ("pretrain.initialize_from",),
    "finetune": (
        *("finetune.source", "finetune.validation", "finetune.initialize_from"),
        *("finetune.distill.teacher", "finetune.distill.unlabelled"),
    ),
    "evaluate": ("evaluate.source",),
    "predict": (),
}
READS["run"] = tuple(key for keys in READS.values() for key in keys)
READS["tune"] = (*READS["finetune"], *READS["evaluate"])
#: Of a job. Ray gives a job that is to stop three seconds; a checkpoint may take longer.
_ENVIRONMENT = {FOLLOWED: "1", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
_OWN = ("scratch", "pretrain")  # of `initialize_from`: in the run's storage
_TAIL = 50  # lines of a log that may hold the result


def check(experiment: Experiment, command: str) -> None:
    """Refuse what only this machine could read.

    Raises:
        ConfigError: an unknown command, or a path that means nothing on the cluster.
    """
    if command not in READS:
        raise ConfigError(f"submit {command}: choose one of {', '.join(READS)}")
    storage = experiment.run.storage
    if not _is_everywhere(storage):
        raise ConfigError(
            f"run.storage={storage} is relative: each node would have its own; name a folder that "
            "all nodes share (/mnt/shared/runs), or a URI (s3://bucket/runs)"
        )
    for key in READS[command]:
        for path in _paths(experiment, key):
            if not _is_everywhere(path):
                raise ConfigError(
                    f"{key}: {path} is relative to this machine's folder; name it as the cluster's "
                    "nodes read it: an absolute path, or a URI"
                )


def submit(
    cluster: Cluster,
    command: str,
    experiment: Experiment,
    arguments: Sequence[str],
    display: Display,
) -> Job:
    """Submit a command, or find the job that is at it already, and say which."""
    there = experiment.model_copy(
        update={"ray": experiment.ray.model_copy(update={"address": None})}
    )
    name = experiment.run.name
    before = {job.id for job in cluster.jobs()}
    job = cluster.submit(command, name, there, arguments, _ENVIRONMENT)
    if job.id in before:
        display.say(f"{job.id} is at work already: following it")
    else:
        display.say(f"submitted {job.id} to {cluster.address}")
    return job


def follow(cluster: Cluster, job: Job, display: Display) -> dict[str, Any]:
    """Show what a job prints until it ends; Ctrl-C leaves it running.

    Returns:
        The job's id, status, exit code and seconds, and the result of its command.
    """
    tail: list[str] = []
    try:
        for line in cluster.follow(job):
            tail = [*tail[-_TAIL:], line]
            if not line.startswith("{"):  # the result: for standard output, if for anyone
                display.relay(line)
    except KeyboardInterrupt:
        display.say(
            f"detached; {job.id} goes on. `raybert logs {job.run}` follows it, "
            f"`raybert stop {job.run}` ends it (--address {cluster.address})"
        )
        raise
    ended, code = cluster.job(job.id), cluster.exit_code(job)
    seconds = (ended.ended or 0) - (ended.begun or 0) if ended.ended and ended.begun else None
    spent = f" after {clock(seconds)}" if seconds is not None else ""
    display.say(f"{job.id} {ended.status.lower()}{spent}, exit code {code}")
    return {
        **dataclasses.asdict(ended),
        "exit_code": code,
        "result": result_of(tail) if code == 0 else None,
    }


def _paths(experiment: Experiment, key: str) -> list[str]:
    value: Any = experiment
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, SourceConfig):
        return value.paths
    given = value if isinstance(value, list) else [value]
    return [path for path in given if path is not None and path not in _OWN]


def _is_everywhere(path: str) -> bool:
    return "://" in path or path.startswith(("/", "sample:"))
