"""List the experiments of a storage with their progress and size, and delete them.

An experiment is read from one listing of its folder and a few small files, so that an object store
gets few requests.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raybert.config import build
from raybert.data.corpus.manifest import MANIFEST, Manifest
from raybert.errors import RaybertError, UserError, damaged_file
from raybert.experiment import RunConfig
from raybert.pipeline.stages import METRICS
from raybert.records import metric_of, selected
from raybert.storage.folder import File, Folder
from raybert.storage.registry import REGISTRY
from raybert.train.metrics_log import read_metrics
from raybert.train.run_folder import RESULT, read_result

STAGES = ("corpus", "pretrain", "finetune", "tune", "ensemble", "folds")
BUSY_SECONDS = 600.0  # since the last change; by default an active run writes more often

_COMMIT = re.compile(r"checkpoints/step-(\d+)(?:-a\d+)?\.json")
_TRIAL = re.compile(r"trials/[^/]+/trial\.json")
_FOLD = re.compile(r"\d+-of-\d+/result\.json")
_MEMBER = re.compile(r"members/[^/]+/trial\.json")


@dataclass(frozen=True)
class Stage:
    """Progress of a stage."""

    name: str
    state: Literal["finished", "begun", "damaged"]
    bytes: int
    changed: float  # Unix time, seconds
    step: int | None = None  # of a stage that trains
    total_steps: int | None = None
    attempts: int = 0
    figures: dict[str, float] = field(default_factory=dict)  # metric, loss, rows, trials
    problem: str | None = None  # of a damaged stage: which file, and what is wrong


@dataclass(frozen=True)
class Run:
    """An experiment and its stages."""

    name: str
    bytes: int
    changed: float  # Unix time, seconds
    stages: list[Stage]


def list_runs(storage: Folder) -> list[Run]:
    """Return the experiments of a storage, sorted by name."""
    return [run for name in storage.names() if (run := _read(storage, name)) is not None]


def find_run(storage: Folder, name: str) -> Run:
    """Return an experiment by its name; a UserError if there is none, or it is a symbolic link."""
    build(RunConfig, {"name": name}, "runs")
    # Its target is outside of the storage, which resolving the link would hide.
    if storage.is_local and Path(storage.join(name)).is_symlink():
        raise UserError(f"{storage.join(name)} is a link; remove it or its target yourself")
    found = _read(storage, name)
    if found is None:
        known = ", ".join(run.name for run in list_runs(storage)) or "none"
        raise UserError(f"{storage} has no experiment named {name}; experiments: {known}")
    return found


def check_idle(storage: Folder, run: Run) -> None:
    """Raise a UserError if one of the experiment's files was changed in the last minutes."""
    ago = time.time() - run.changed
    if ago < BUSY_SECONDS:
        raise UserError(
            f"{storage.join(run.name)} was written to {max(0.0, ago):.0f} s ago; stop the "
            "run (`raybert stop`) and wait, or pass --force"
        )


def _read(storage: Folder, name: str) -> Run | None:
    if name == REGISTRY or not any(storage.exists(f"{name}/{stage}") for stage in STAGES):
        return None
    folder = storage / name
    files = folder.files()
    read = [_read_stage(folder / stage, stage, files) for stage in STAGES]
    stages = [stage for stage in read if stage is not None]
    changed = max((file.changed for file in files), default=0.0)
    return Run(name, sum(file.bytes for file in files), changed, stages)


def _read_stage(folder: Folder, name: str, experiment_files: Sequence[File]) -> Stage | None:
    files = [file for file in experiment_files if file.name.startswith(f"{name}/")]
    if not files:
        return None
    names = {file.name.removeprefix(f"{name}/") for file in files}
    finished = (MANIFEST if name == "corpus" else RESULT) in names
    state: Literal["finished", "begun", "damaged"] = "finished" if finished else "begun"
    progress: dict[str, Any] = {}
    try:
        with damaged_file(folder.join(MANIFEST if name == "corpus" else RESULT)):
            progress = _numbers_of(_READERS.get(name, _read_training)(folder, names, finished))
    except FileNotFoundError:  # just being written
        pass
    except RaybertError as error:
        state, progress = "damaged", {"problem": str(error)}
    return Stage(
        name=name,
        state=state,
        bytes=sum(file.bytes for file in files),
        changed=max(file.changed for file in files),
        attempts=sum(other.startswith("attempts/") for other in names),
        **progress,
    )


def _numbers_of(progress: dict[str, Any]) -> dict[str, Any]:
    """The same progress; a ValueError if what is to be a number is none."""
    figures = progress.get("figures", {})
    for name, value in [*progress.items(), *figures.items()]:
        if name == "figures" or (name in ("step", "total_steps") and value is None):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {type(value).__name__}")
        if name in ("step", "total_steps") and not isinstance(value, int):
            raise ValueError(f"{name} is no integer")
    return progress


def _read_corpus(folder: Folder, names: set[str], finished: bool) -> dict[str, Any]:
    if not finished:
        return {}
    manifest = Manifest.read(folder)
    rows = sum(split.rows for split in manifest.splits.values())
    return {"figures": {"rows": rows, "vocab_size": manifest.vocab_size}}


def _read_search(folder: Folder, names: set[str], finished: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"trials": sum(map(bool, map(_TRIAL.fullmatch, names)))}
    if finished:
        result = read_result(folder)
        metric = metric_of(result["best"])
        figures[metric] = result["best"]["seeds"][metric]["mean"]
        if "test" in result:
            figures |= _test_figure(result["test"])
    return {"figures": figures}


def _read_ensemble(folder: Folder, names: set[str], finished: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"members": sum(map(bool, map(_MEMBER.fullmatch, names)))}
    if finished:
        result = read_result(folder)
        figures[metric_of(result)] = result["ensemble"][metric_of(result)]
    return {"figures": figures}


def _read_folds(folder: Folder, names: set[str], finished: bool) -> dict[str, Any]:
    if not finished:
        return {"figures": {"folds": sum(map(bool, map(_FOLD.fullmatch, names)))}}
    result = read_result(folder)
    return {"figures": {"folds": len(result["folds"]), metric_of(result): result["mean"]}}


def _test_figure(metrics: Mapping[str, Any]) -> dict[str, float]:
    name, value = selected(metrics)
    return {f"test_{name}": value} if math.isfinite(value) else {}


def _read_training(folder: Folder, names: set[str], finished: bool) -> dict[str, Any]:
    """Return the steps and figures of a run, from its result, its log or its checkpoints."""
    if finished:
        result = read_result(folder)
        keys = (metric_of(result), "loss")
        figures = {key: result[key] for key in keys if result.get(key) is not None}
        if METRICS in names:
            with damaged_file(folder.join(METRICS)):
                figures |= _numbers_of(_test_figure(folder.read_json(METRICS)))
        steps = {key: result.get(key) for key in ("step", "total_steps")}
        return {**steps, "figures": figures}
    trained = [record for record in read_metrics(folder) if record["kind"] == "train"]
    if trained:
        return {key: trained[-1].get(key) for key in ("step", "total_steps")}
    commits = [int(match[1]) for match in map(_COMMIT.fullmatch, names) if match]
    return {"step": max(commits, default=0)}


_READERS = {
    "corpus": _read_corpus,
    "tune": _read_search,
    "ensemble": _read_ensemble,
    "folds": _read_folds,
}
