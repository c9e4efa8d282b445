"""Submit a command to a cluster: checks on this machine, an estimate, and the job's progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from raybert.cluster import interrupts
from raybert.cluster.internals.core import JOB_STOP_SECONDS
from raybert.cluster.internals.train import PROCESS_GROUP_SHUTDOWN
from raybert.data.sources.settings import SourceConfig
from raybert.errors import ConfigError, UserError
from raybert.experiment import Experiment
from raybert.jobs.doctor.run_checks import check_request
from raybert.jobs.estimate import TRAINING_STAGES, estimate_lines
from raybert.jobs.ray_jobs import CHECK_COMMAND, Cluster, ClusterJob, result_of, texts_of
from raybert.storage.folder import check_texts
from raybert.terminal.display import FOLLOWED, Display
from raybert.terminal.formats import clock, size
from raybert.tune.settings import TrialConfig
from raybert.tune.space_checks import read_space

#: The commands that can be submitted, and the keys of each command's inputs outside its storage.
INPUT_KEYS = {
    "corpus": ("corpus.source", "corpus.overlap", "corpus.tokenizer.path"),
    "pretrain": ("pretrain.initialize_from", "pretrain.branch_from"),
    "finetune": (
        *("finetune.source", "finetune.validation", "finetune.initialize_from"),
        *("finetune.distill.teacher", "finetune.distill.unlabelled", "finetune.unlabelled"),
    ),
    "evaluate": ("evaluate.source",),
    "predict": (),
}
INPUT_KEYS["run"] = tuple(key for keys in INPUT_KEYS.values() for key in keys)
INPUT_KEYS["tune"] = (*INPUT_KEYS["finetune"], *INPUT_KEYS["evaluate"])
#: Variables of every job.
_ENVIRONMENT = {
    FOLLOWED: "1",
    JOB_STOP_SECONDS: "90",
    **PROCESS_GROUP_SHUTDOWN,  # needed here too: Ray does not forward it
}
#: Options whose values are paths, by the names of their parameters.
_PATH_OPTIONS = {"model": "--model", "source": "--input", "output": "--output"}
_NO_PATHS = ("scratch", "pretrain", "baseline")  # values that name no path
_TAIL = 50  # last lines of a log, which may hold the result
_MAX_SHOWN = 3  # differing settings in a message


def check(
    experiment: Experiment, command: str, options: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Raise ConfigError for paths that only this machine can read, and other mistakes.

    `options` are further options of the command, by parameter: `{"output": "out.jsonl"}`.
    """
    if command not in INPUT_KEYS:
        raise ConfigError(f"submit {command}: choose one of {', '.join(INPUT_KEYS)}")
    check_texts(texts_of([*options.values(), experiment.model_dump(mode="json")]))
    check_storage(experiment)
    for name, option in _PATH_OPTIONS.items():
        path = options.get(name)
        if path is not None and not _is_shared_path(path):
            raise ConfigError(
                f"{command} {option} {path}: a job has a folder of its own, which is gone when it "
                "ends; name it as the cluster's nodes read it: an absolute path, or a URI"
            )
    for key in INPUT_KEYS[command]:
        for path in _paths(experiment, key):
            if not _is_shared_path(path):
                raise ConfigError(
                    f"{key}: {path} is relative to this machine's folder; name it as the cluster's "
                    "nodes read it: an absolute path, or a URI"
                )
    if command == "tune":
        base = TrialConfig(model=experiment.model, finetune=experiment.finetune)
        read_space(experiment.tune, base)


def check_storage(experiment: Experiment) -> None:
    """Raise ConfigError for a relative path, which the nodes do not share."""
    storage = experiment.run.storage
    if not _is_shared_path(storage):
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
    """Submit a command, or find its active job, and show which, after an estimate.

    With `checks`, a job that trains begins with the checks of the cluster. UserError: an active job
    of another command writes the same stages.
    """
    name, is_training = experiment.run.name, command in TRAINING_STAGES
    remote = _for_cluster(experiment)
    if is_training and cluster.active_job(command, name, remote, arguments) is None:
        with display.stage("estimate"):  # an unreachable storage takes seconds
            lines = estimate_lines(experiment, command, cluster.resources())
        for line in lines:
            display.print(f"estimate  {line}")
    environment = {**_ENVIRONMENT, **(check_request() if checks and is_training else {})}
    submission = cluster.submit(command, name, remote, arguments, environment)
    job = submission.job
    if submission.package is not None:
        package = size(submission.package)
        display.print(f"submitted {job.id} to {cluster.address}, package {package}")
    else:
        display.print(f"{job.id} is already active: following it")
    if submission.ignored:
        display.print(
            f"warning   {job.id} has other settings ({_format_changes(submission.ignored)}); "
            f"yours are not applied: `raybert stop {job.id} --address {cluster.address}`, "
            "then submit again"
        )
    return job


def _format_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Format the first few differing settings and the number of the others."""
    shown = [f"{key}: {old} -> {new}" for key, (old, new) in list(changed.items())[:_MAX_SHOWN]]
    more = len(changed) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def diagnose(cluster: Cluster, experiment: Experiment, display: Display) -> dict[str, Any]:
    """Run the checks of a cluster as a job, and return the result of `run_checks`."""
    check_storage(experiment)
    environment = {**_ENVIRONMENT, **check_request()}
    name = experiment.run.name
    job = cluster.submit(CHECK_COMMAND, name, _for_cluster(experiment), environment=environment).job
    ended = follow(cluster, job, display)
    if ended["result"] is None:
        last = (ended["message"].strip().splitlines() or [ended["status"]])[-1]
        raise UserError(
            f"{cluster.address} could not start the checks: {last}; install raybert's dependencies "
            "on every node"
        )
    return dict(ended["result"])


def _for_cluster(experiment: Experiment) -> Experiment:
    """Return the experiment for the cluster: a job connects to the Ray that runs it."""
    return experiment.model_copy(
        update={"ray": experiment.ray.model_copy(update={"address": None})}
    )


def follow(cluster: Cluster, job: ClusterJob, display: Display) -> dict[str, Any]:
    """Show a job's output until it ends, and return its fields, exit code and result.

    Ctrl-C detaches and leaves the job running.
    """
    tail: list[str] = []
    detached = (
        f"detached; {job.id} continues. `raybert logs {job.run}` follows it, "
        f"`raybert stop {job.run}` stops it (--address {cluster.address})"
    )
    before = interrupts.say(detached)
    try:
        for line in cluster.follow(job):
            tail = [*tail[-_TAIL:], line]
            if not line.startswith("{"):  # the result, for standard output
                display.forward(line)
    except KeyboardInterrupt:
        display.print(detached)
        raise
    finally:
        interrupts.say(before)
    ended, code = cluster.job(job.id), cluster.exit_code(job)
    seconds = (ended.ended or 0) - (ended.begun or 0) if ended.ended and ended.begun else None
    spent = f" after {clock(seconds)}" if seconds is not None else ""
    display.print(f"{job.id} {ended.status.lower()}{spent}, exit code {code}")
    return {**dataclasses.asdict(ended), "exit_code": code, "result": result_of(tail)}


def _paths(experiment: Experiment, key: str) -> list[str]:
    value: Any = experiment
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, SourceConfig):
        return value.paths
    paths = value if isinstance(value, list) else [value]
    return [path for path in paths if path is not None and path not in _NO_PATHS]


def _is_shared_path(path: str) -> bool:
    return "://" in path or path.startswith(("/", "sample:"))
