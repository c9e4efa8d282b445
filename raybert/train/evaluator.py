"""Evaluation during training, and the weights that a run ends with: those of the best one."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from raybert.errors import DamagedError
from raybert.storage.retry import retry
from raybert.train.autocast import autocast
from raybert.train.checkpoint import CheckpointStore
from raybert.train.distributed import Group
from raybert.train.run_log import RunLog
from raybert.train.settings import TrainConfig
from raybert.train.state import TrainState
from raybert.train.task import Task


class Evaluator:
    """Evaluates a task's model, with the averages in the place of its weights if there are any."""

    def __init__(self, task: Task, config: TrainConfig, group: Group, state: TrainState) -> None:
        """Set up; the best evaluation is noted in `state.progress`."""
        self._task, self._config, self._group, self._state = task, config, group, state
        self._last: dict[str, Any] = {}  # the metrics of the last evaluation

    def evaluate(self) -> tuple[dict[str, Any], bool]:
        """Evaluate on all ranks; return the metrics, and whether they are the best so far."""
        model = self._state.model
        model.eval()
        with (
            self._state.averages.swapped_in(),
            torch.inference_mode(),
            autocast(self._config.precision, self._group.device),
        ):
            self._last = self._task.evaluate()
        model.train()
        return self._last, self._state.progress.note_best(self._last)

    def load_best(self, store: CheckpointStore, log: RunLog) -> dict[str, Any]:
        """Put the best weights into rank 0's model, or leave the last ones if those are lost.

        Returns:
            The metrics of the model's weights, and the progress; `best_step` is the step of these
            weights, None where no evaluation gave a score.

        Raises:
            StorageError: the best weights can't be read for `retry_timeout_s`.
        """
        state, progress, metrics = self._state, self._state.progress, self._last
        best, best_metrics = progress.best_step, progress.best_metrics
        if best == progress.step:
            metrics = best_metrics or metrics
        elif best is not None and self._group.rank == 0:
            timeout_s = self._config.retry_timeout_s
            try:
                state.restore(retry(partial(store.load, best), timeout_s, log.storage_event))
                metrics = best_metrics or {}
            except DamagedError as error:
                message = f"{error}; the model has the weights of step {progress.step} instead"
                log.event("best checkpoint lost", message)
                progress = replace(progress, best_score=metrics["score"], best_step=progress.step)
        state.averages.swap()
        # The other ranks wait here: rank 0 may retry as long again for the model it writes next.
        self._group.gather(None)
        result = {**metrics, **asdict(progress)}
        del result["best_metrics"]
        return result
