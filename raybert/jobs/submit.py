"""Submitting a stage to a cluster: what is looked at first, and what is told on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from raybert.cluster.internals.core import JOB_STOP_SECONDS
from raybert.cluster.internals.train import PROCESS_GROUP_SHUTDOWN
from raybert.data.sources.source_config import SourceConfig
from raybert.errors import ConfigError, UserError
from raybert.experiment import Experiment
from raybert.jobs.doctor.run_checks import request
from raybert.jobs.estimate import TRAINS, Machines, estimate_lines
from raybert.jobs.ray_jobs import CHECK_COMMAND, Cluster, ClusterJob, result_of
from raybert.terminal.display import FOLLOWED, Display, clock, size
from raybert.tune.settings import TrialConfig
from raybert.tune.space_checks import read_space

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
#: Of a job.
_ENVIRONMENT = {
    FOLLOWED: "1",
    JOB_STOP_SECONDS: "90",
    **PROCESS_GROUP_SHUTDOWN,  # here too, for it is not on the list
}
#: Options of commands that name a place, by the names of their parameters.
_PLACES = {"model": "--model", "source": "--input", "output": "--output"}
_OWN = ("scratch", "pretrain")  # of `initialize_from`: in the run's storage
_TAIL = 50  # lines of a log that may hold the result
_MOST_SHOWN = 3  # settings that differ


def check(
    experiment: Experiment, command: str, options: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuse what only this machine could read, and what a job would refuse or write for nobody.

    Args:
        experiment: what is configured.
        command: of the command line: `predict`.
        options: more of the command line, by parameter: `{"output": "out.jsonl"}`.

    Raises:
        ConfigError: an unknown command, a path that means nothing on the cluster, a search space
            that can't be right.
    """
    if command not in READS:
        raise ConfigError(f"submit {command}: choose one of {', '.join(READS)}")
    check_storage(experiment)
    for name, option in _PLACES.items():
        path = options.get(name)
        if path is not None and not _is_everywhere(path):
            raise ConfigError(
                f"{command} {option} {path}: a job has a folder of its own, which is gone when it "
                "ends; name it as the cluster's nodes read it: an absolute path, or a URI"
            )
    for key in READS[command]:
        for path in _paths(experiment, key):
            if not _is_everywhere(path):
                raise ConfigError(
                    f"{key}: {path} is relative to this machine's folder; name it as the cluster's "
                    "nodes read it: an absolute path, or a URI"
                )
    if command == "tune":
        base = TrialConfig(model=experiment.model, finetune=experiment.finetune)
        read_space(experiment.tune, base)


def check_storage(experiment: Experiment) -> None:
    """Refuse a storage that each node would have for itself.

    Raises:
        ConfigError: it is relative.
    """
    storage = experiment.run.storage
    if not _is_everywhere(storage):
        raise ConfigError(
            f"run.storage={storage} is relative: each node would have its own; name a folder that "
            "all nodes share (/mnt/shared/runs), or a URI (s3://bucket/runs)"
        )


def submit(
    cluster: Cluster,
    command: str,
    experiment: Experiment,
    arguments: Sequence[str],
    display: Display,
    *,
    checks: bool = True,
) -> ClusterJob:
    """Submit a command, or find the job that is at it already, and say which.

    What the command will take is told before. With `checks`, a command that trains begins on the
    cluster with a visit of the doctor's.

    Raises:
        UserError: a job of another command writes what this one would.
    """
    name, trains, there = experiment.run.name, command in TRAINS, _there(experiment)
    if trains and cluster.at_work(command, name, there, arguments) is None:
        with display.stage("estimate"):  # a storage that does not answer is waited for
            lines = estimate_lines(experiment, command, Machines.of(cluster.resources()))
        for line in lines:
            display.say(f"estimate  {line}")
    environment = {**_ENVIRONMENT, **(request() if checks and trains else {})}
    made = cluster.submit(command, name, there, arguments, environment)
    job = made.job
    if made.package is not None:
        display.say(f"submitted {job.id} to {cluster.address}, package {size(made.package)}")
    else:
        display.say(f"{job.id} is at work already: following it")
    if made.ignored:
        display.say(
            f"warning   {job.id} has other settings ({_changes(made.ignored)}); yours are not "
            f"applied: `raybert stop {job.id} --address {cluster.address}`, then submit again"
        )
    return job


def _changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The keys that differ, as the first few of them and how many more."""
    shown = [f"{key}: {old} -> {new}" for key, (old, new) in list(changed.items())[:_MOST_SHOWN]]
    more = len(changed) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def diagnose(cluster: Cluster, experiment: Experiment, display: Display) -> dict[str, Any]:
    """Let the doctor visit a cluster, as a job; what is found there is shown.

    Returns:
        What `doctor.visit` returns.

    Raises:
        ConfigError: the storage is one that each node would have for itself.
        UserError: the visit could not begin.
    """
    check_storage(experiment)
    environment = {**_ENVIRONMENT, **request()}
    name = experiment.run.name
    job = cluster.submit(CHECK_COMMAND, name, _there(experiment), environment=environment).job
    ended = follow(cluster, job, display)
    if ended["result"] is None:
        last = (ended["message"].strip().splitlines() or [ended["status"]])[-1]
        raise UserError(
            f"{cluster.address} could not begin the checks: {last}; install raybert's dependencies "
            "on every node"
        )
    return dict(ended["result"])


def _there(experiment: Experiment) -> Experiment:
    """The experiment as the cluster is given it: a job's Ray is the one that it runs on."""
    return experiment.model_copy(
        update={"ray": experiment.ray.model_copy(update={"address": None})}
    )


def follow(cluster: Cluster, job: ClusterJob, display: Display) -> dict[str, Any]:
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
        "result": result_of(tail),
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
