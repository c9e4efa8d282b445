"""The tasks on texts by name, which of them a data set is for, and the task of a model directory.

To add a task, write a subclass of `TextTask` in a file of its own and add it to `TASKS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from raybert.errors import DamagedError, UserError, one_line
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.multi_label import MultiLabel
from raybert.tasks.ordinal import Ordinal
from raybert.tasks.protocol import TableData, TextTask
from raybert.tasks.regression import Regression
from raybert.tasks.single_label import SingleLabel
from raybert.tasks.token_classification import TokenClassification

#: In the order in which they are asked whether labels look like theirs; the last one takes all.
TASKS: dict[str, type[TextTask]] = {
    task.name: task for task in (TokenClassification, MultiLabel, Regression, Ordinal, SingleLabel)
}


class Choice(NamedTuple):
    """A task and why it was chosen."""

    task: type[TextTask]
    reason: str


def choose_task(configured: str, texts: Sequence[Any], labels: Sequence[Any]) -> Choice:
    """The configured task, or for `auto` the first one that fits texts and labels of some rows."""
    if configured != "auto":
        return Choice(TASKS[configured], f"finetune.task={configured}")
    for task in TASKS.values():
        reason = task.recognizes(texts, labels)
        if reason:
            return Choice(task, reason)
    raise AssertionError("the last task takes every label")


def tables_of(metrics: Mapping[str, Any]) -> list[TableData]:
    """The tables of a `metrics.json`; none of a task that is not registered here."""
    name = metrics.get("task", SingleLabel.name)  # the only one when there were no tasks yet
    if name not in TASKS:
        return []
    return TASKS[name](list(metrics.get("label_names") or [])).tables(dict(metrics))


def read_columns(folder: Folder) -> dict[str, Any]:
    """The columns that a model was trained on, by the settings of a source; empty where unknown."""
    return _columns(huggingface.read_config_json(folder))


def _columns(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict((config.get("raybert", {}).get("task") or {}).get("columns", {}))


def read_task(folder: Folder) -> tuple[TextTask, bool]:
    """The task of a model directory, and whether it reads pairs of texts.

    Raises:
        UserError: no task has its class and problem type.
    """
    config = huggingface.read_config_json(folder)
    task = task_of_config_json(config, huggingface.read_label_names(folder), str(folder))
    if "temperature" in config.get("raybert", {}):  # `load_classifier` has divided the logits
        fitted = {key: value for key, value in task.fitted.items() if key != "temperature"}
        task = replace(task, fitted=fitted)
    try:
        task.check_fitted()
    except ValueError as error:
        where = folder.join("config.json")
        raise DamagedError(f"{where} is damaged: raybert.task.fitted: {one_line(error)}") from None
    if task.is_per_token != huggingface.is_per_token(config):
        raise DamagedError(
            f"{folder.join('config.json')} is damaged: raybert.task is {task.name}, and the "
            f"architecture is {huggingface.architecture_of(config)}"
        )
    return task, _columns(config).get("pair_column") is not None


def task_of_config_json(config: Mapping[str, Any], labels: Sequence[str], where: str) -> TextTask:
    """The task of a model directory, by its `config.json`; `where` names it in messages.

    Raises:
        UserError: no task has its class and problem type.
    """
    own = config.get("raybert", {}).get("task") or {}
    architecture = next(iter(config.get("architectures") or []), "ForSequenceClassification")
    problem_type = config.get("problem_type")
    name = own.get("name")
    found = TASKS.get(str(name)) if name is not None else None
    if name is None:  # of another origin, or made before there were tasks
        described = (
            t for t in TASKS.values() if t.describes(str(architecture), problem_type, len(labels))
        )
        found = next(described, None)
    if found is not None:
        return found(list(labels), dict(own.get("fitted", {})))
    known = ", ".join(dict.fromkeys(task.problem_type or task.name for task in TASKS.values()))
    raise UserError(
        f"{where} was trained for {name or f'problem_type={problem_type}'} "
        f"({architecture}); raybert reads "
        f"{known}"
    )
