"""The experiments in a storage: what each has come to, how large it is, and its end.

All of it is read off one listing of an experiment's folder and a few small files, so that an object
store is asked little.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raybert.config import build
from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.errors import RaybertError, UserError
from raybert.experiment import RunConfig
from raybert.pipeline.stages import METRICS
from raybert.storage.folder import File, Folder
from raybert.storage.registry import REGISTRY
from raybert.train.metrics_log import read_metrics
from raybert.train.run_folder import RESULT

STAGES = ("corpus", "pretrain", "finetune", "tune", "ensemble")
BUSY_SECONDS = 600.0  # since the last change; a run at work writes oftener, unless told not to

_COMMIT = re.compile(r"checkpoints/step-(\d+)(?:-a\d+)?\.json")
_TRIAL = re.compile(r"trials/[^/]+/trial\.json")
_MEMBER = re.compile(r"members/[^/]+/trial\.json")


@dataclass(frozen=True)
class Stage:
    """How far a stage has come."""

    name: str
    state: Literal["finished", "begun"]
    bytes: int
    changed: float  # Unix time, seconds
    step: int | None = None  # of a stage that trains
    total_steps: int | None = None
    attempts: int = 0
    figures: dict[str, float] = field(default_factory=dict)  # what it is for


@dataclass(frozen=True)
class Run:
    """An experiment."""

    name: str
    bytes: int
    changed: float  # Unix time, seconds
    stages: list[Stage]


def listed(storage: Folder) -> list[Run]:
    """The experiments in a storage, by name."""
    return [run for name in storage.names() if (run := _read(storage, name)) is not None]


def find(storage: Folder, name: str) -> Run:
    """An experiment, by its name.

    Raises:
        UserError: there is none; a name that leads elsewhere is none.
    """
    build(RunConfig, {"name": name}, "runs")
    # What a link leads to is not the storage's, and to resolve it would hide that.
    if storage.is_local and Path(storage.join(name)).is_symlink():
        raise UserError(f"{storage.join(name)} is a link; remove it, or what it leads to, yourself")
    found = _read(storage, name)
    if found is None:
        known = ", ".join(run.name for run in listed(storage)) or "none"
        raise UserError(f"{storage} has no experiment named {name}; experiments: {known}")
    return found


def check_idle(storage: Folder, run: Run) -> None:
    """Refuse to touch an experiment that something may be writing to.

    Raises:
        UserError: a file of it is only minutes old.
    """
    ago = time.time() - run.changed
    if ago < BUSY_SECONDS:
        raise UserError(
            f"{storage.join(run.name)} was written to {max(0.0, ago):.0f} s ago; stop what is at "
            "work there (`raybert stop`) and wait, or pass --force"
        )


def delete(storage: Folder, run: Run) -> None:
    """Delete an experiment with all that it holds."""
    storage.delete(run.name)


def _read(storage: Folder, name: str) -> Run | None:
    """What there is of an experiment; None where the name is none's."""
    if name == REGISTRY or not any(storage.exists(f"{name}/{stage}") for stage in STAGES):
        return None
    folder = storage / name
    files = folder.files()
    stages = [_stage(folder / stage, stage, _within(files, stage)) for stage in STAGES]
    return Run(
        name=name,
        bytes=sum(file.bytes for file in files),
        changed=max((file.changed for file in files), default=0.0),
        stages=[stage for stage in stages if stage is not None],
    )


def _within(files: Sequence[File], folder: str) -> list[File]:
    """The files of a folder, named from there."""
    prefix = f"{folder}/"
    return [
        file._replace(name=file.name.removeprefix(prefix))
        for file in files
        if file.name.startswith(prefix)
    ]


def _stage(folder: Folder, name: str, files: Sequence[File]) -> Stage | None:
    if not files:
        return None
    names = {file.name for file in files}
    finished = (MANIFEST if name == "corpus" else RESULT) in names
    try:
        told = _told(folder, name, names, finished)
    except (RaybertError, FileNotFoundError):  # damaged, or just being written
        told = {}
    return Stage(
        name=name,
        state="finished" if finished else "begun",
        bytes=sum(file.bytes for file in files),
        changed=max(file.changed for file in files),
        attempts=sum(other.startswith("attempts/") for other in names),
        **told,
    )


def _told(folder: Folder, name: str, names: set[str], finished: bool) -> dict[str, Any]:
    if name == "corpus":
        return _corpus(folder, finished)
    if name == "tune":
        return {"figures": _search(folder, names, finished)}
    if name == "ensemble":
        return {"figures": _ensemble(folder, names, finished)}
    return _training(folder, names)


def _corpus(folder: Folder, finished: bool) -> dict[str, Any]:
    if not finished:
        return {}
    manifest = Manifest.read(folder)
    rows = sum(split.rows for split in manifest.splits.values())
    return {"figures": {"rows": rows, "vocab_size": manifest.vocab_size}}


def _search(folder: Folder, names: set[str], finished: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"trials": sum(map(bool, map(_TRIAL.fullmatch, names)))}
    if finished:
        result = folder.read_json(RESULT)
        figures["accuracy"] = result["best"]["seeds"]["accuracy"]["mean"]
        if "test" in result:
            figures["test_accuracy"] = result["test"]["accuracy"]
    return figures


def _ensemble(folder: Folder, names: set[str], finished: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"members": sum(map(bool, map(_MEMBER.fullmatch, names)))}
    if finished:
        figures["accuracy"] = folder.read_json(RESULT)["ensemble"]["accuracy"]
    return figures


def _training(folder: Folder, names: set[str]) -> dict[str, Any]:
    """The steps and figures of a run, from its result, its log or its checkpoints."""
    if RESULT in names:
        result = folder.read_json(RESULT)
        figures = {key: result[key] for key in ("accuracy", "loss") if result.get(key) is not None}
        if METRICS in names:
            figures["test_accuracy"] = folder.read_json(METRICS)["accuracy"]
        steps = {key: result.get(key) for key in ("step", "total_steps")}
        return {**steps, "figures": figures}
    trained = [record for record in read_metrics(folder) if record["kind"] == "train"]
    if trained:
        return {key: trained[-1].get(key) for key in ("step", "total_steps")}
    commits = [int(match[1]) for match in map(_COMMIT.fullmatch, names) if match]
    return {"step": max(commits, default=0)}
