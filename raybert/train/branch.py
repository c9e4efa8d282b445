"""A run that begins with a checkpoint of another one: `pretrain.branch_from: runs/base@5000`.

With the schedule `stable-decay` (arXiv 2404.06395) the learning rate stays until the last part of
a run. One long run whose `milestones` are kept can so be ended at several lengths: each branch
trains the decay only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from raybert.errors import ConfigError, DataError
from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.run_folder import (
    CONFIG,
    ORDER,
    changed_inputs,
    changed_settings,
    format_changes,
)
from raybert.train.state import Progress

_KEY = "pretrain.branch_from"
_SHOWN = 8  # steps in a message


def find_branch(given: str) -> tuple[Folder, int]:
    """The run and the step of `RUN@STEP`; the run may be named by its experiment.

    Raises:
        ConfigError: it is of another form, or the run has no checkpoint of that step.
    """
    path, _, number = given.rpartition("@")
    if not path or not number.isdecimal():
        raise ConfigError(f"{_KEY}={given}: give a run and a step, as runs/base@5000")
    step = int(number)
    for run in (Folder(path) / "pretrain", Folder(path)):
        if run.exists(CONFIG):
            steps = CheckpointStore(run, 0, 1).steps()
            if step in steps:
                return run, step
            has = ", ".join(f"{found:,}" for found in steps[-_SHOWN:]) or "none"
            raise ConfigError(
                f"{_KEY}={given}: {run} has no checkpoint of step {step:,}; it has {has} "
                "(pretrain.milestones names steps to keep)"
            )
    raise ConfigError(f"{_KEY}={given}: {path} has no run of pretraining; check the path")


def begin_with(
    run: Folder,
    given: str,
    config_yaml: str,
    sections: tuple[str, ...],
    inputs: Mapping[str, str],
) -> None:
    """Give a run the checkpoint that it branches from, unless it has one of its own.

    `config_yaml` is the complete configuration, `sections` and `inputs` are those of `open_run`.

    Raises:
        ConfigError: as `find_branch`, or a setting differs that a resumed run could not change.
        DataError: the other run read another corpus.
    """
    if CheckpointStore(run, 0, 1).steps():
        return
    base, step = find_branch(given)
    refused = changed_settings(base, config_yaml, "pretrain", sections)
    if refused:
        raise ConfigError(
            f"{_KEY}={given}: {base} has other settings ({format_changes(refused)}); set them alike"
        )
    for name in changed_inputs(base, inputs):
        raise DataError(f"{_KEY}={given}: {base} read another {name}; build it alike")
    snapshot = CheckpointStore(base, 0, 1).load(step)
    progress = Progress(**snapshot.state)
    progress.forget_best()  # its weights are in the other run
    snapshot.state = asdict(progress)
    if base.exists(ORDER):
        run.write_json(ORDER, base.read_json(ORDER))
    CheckpointStore(run, 0, 1).save(snapshot, best_step=None, wait=True)
