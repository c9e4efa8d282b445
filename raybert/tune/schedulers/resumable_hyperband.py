"""Ray Tune's HyperBand, made resumable: its brackets are rebuilt from the TrialStore.

A bracket waits until all its trials have reached a milestone, stops the worse ones and resumes the
others. The brackets follow from when trials started and how they were evaluated, so these events
are replayed in their order. A placeholder stands for each trial of an earlier session; a trial that
is resumed takes its placeholder's position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raybert.cluster.internals.tune import BracketHyperBand
from raybert.tune.trial_store import ENDED, Evaluation, TrialRecord


class _Placeholder:
    """Stands for a trial of an earlier session until Ray Tune resumes it."""

    is_saving = False

    def __init__(self, name: str) -> None:
        self.trial_id, self.status = name, Trial.RUNNING
        self.best = -math.inf
        self.result: dict[str, Any] | None = None  # the last one that the scheduler got
        self.waits = False  # at a milestone, for the other trials of its bracket


class ResumableHyperBand(BracketHyperBand):
    """HyperBand that knows the trials of earlier sessions."""

    def __init__(self, records: Sequence[TrialRecord], **settings: Any) -> None:
        super().__init__(**settings)
        self._records = list(records)
        self._placeholders: dict[str, _Placeholder] = {}
        self._to_process: list[Any] = []  # brackets whose resumed trial waits at a milestone
        self._to_stop: list[Trial] = []  # stopped at a milestone, but not recorded as stopped

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Set the metric, which the replay of earlier sessions needs."""
        is_set = bool(super().set_search_properties(metric, mode, **spec))
        records, self._records = self._records, []
        self._replay(records)
        return is_set

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial to the bracket that is being filled, or put it back into its own."""
        old = self._placeholders.pop(trial.trial_id, None)
        if old is None:
            super().on_trial_add(tune_controller, trial)
        else:
            is_live = self.is_live(old)
            self.replace(old, trial, old.result)
            if not is_live:
                self._to_stop.append(trial)
                trial.set_status(Trial.PAUSED)
                return
            if old.waits:
                self._to_process.append(self.bracket_of(trial))
                trial.set_status(Trial.PAUSED)
                return
        if trial.status == Trial.PAUSED:
            self.allow_to_continue(trial)  # it waits for resources

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Apply the decisions that the replay has left open, then choose as HyperBand does."""
        to_stop, self._to_stop = self._to_stop, []
        for trial in to_stop:
            tune_controller.stop_trial(trial)
        to_process, self._to_process = self._to_process, []
        for bracket in to_process:
            # The other trials may have reached the milestone before this one was resumed.
            self.finish_round(tune_controller, bracket)
        return super().choose_trial_to_run(tune_controller)

    def _replay(self, records: Sequence[TrialRecord]) -> None:
        """Replay the starts, evaluations and ends of earlier sessions' trials in their order."""
        events: list[tuple[float, _Placeholder, Evaluation | None]] = []
        for record in records:
            old = self._placeholders[record.name] = _Placeholder(record.name)
            events.append((record.started, old, None))
            # Ray Tune passes a finished trial's last result to `on_trial_complete` only.
            is_finished = record.state == "finished"
            evaluations = record.evaluations[:-1] if is_finished else record.evaluations
            events += [(evaluation.time, old, evaluation) for evaluation in evaluations]
            if record.state in ENDED:
                last = record.evaluations[-1].time if record.evaluations else record.started
                events.append((max(last, record.ended or 0.0), old, None))
        for _, old, evaluation in sorted(events, key=lambda event: event[0]):
            if self.bracket_of(old) is None:
                super().on_trial_add(None, old)
            elif self.is_live(old):
                self._replay_event(old, evaluation)
        for old in self._placeholders.values():
            self._reserve_position(old)
        self.stop_filling()  # new trials would miss the first milestone

    def _replay_event(self, old: _Placeholder, evaluation: Evaluation | None) -> None:
        controller = SimpleNamespace(stop_trial=self.remove)
        if evaluation is None:
            self.on_trial_remove(controller, old)
            return
        if self.is_paused(old):
            return  # the worker logged it before it was paused; Ray Tune ignored it
        old.status = Trial.RUNNING
        old.best = max(old.best, evaluation.score)
        result = self.make_result(evaluation.epoch, old.best)
        action = BracketHyperBand.on_trial_result(self, controller, old, result)
        old.status = Trial.PAUSED if action == TrialScheduler.PAUSE else Trial.RUNNING

    def _reserve_position(self, old: _Placeholder) -> None:
        """Let a bracket wait for a trial that will be resumed, however far it had come."""
        if self.is_live(old):
            old.waits = self.is_paused(old)
            old.result = self.take_result(old)
            old.status = Trial.RUNNING  # so that it is not chosen to run
