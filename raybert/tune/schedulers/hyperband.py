"""HyperBand over several sessions: its brackets are filled again from what the ledger has.

A bracket waits until all its trials have come to a milestone, stops the worse ones and lets the
others go on to the next. Which trials meet in which bracket, and what each had reached, follows
from when they began and how they were evaluated: the scheduler is told of that once more, in the
order in which it happened. A trial that goes on takes the place that it had.
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


class _Past:
    """A trial of an earlier session, as long as Ray Tune does not have it again."""

    is_saving = False

    def __init__(self, name: str) -> None:
        self.trial_id, self.status = name, Trial.RUNNING
        self.best = -math.inf
        self.result: dict[str, Any] | None = None  # the last one that the scheduler heard
        self.waits = False  # at a milestone, for the others of its bracket


class ResumableHyperBand(BracketHyperBand):
    """HyperBand that knows the trials of earlier sessions."""

    def __init__(self, entries: Sequence[TrialRecord], **settings: Any) -> None:
        """Set up the scheduler; `entries` are the trials so far, in their order."""
        super().__init__(**settings)
        self._entries = list(entries)
        self._past: dict[str, _Past] = {}
        self._late: list[Any] = []  # brackets whose last trial came to its milestone before
        self._lost: list[Trial] = []  # stopped at a milestone, which nobody had written down

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Hear what trials are compared by: from then on the past can be told."""
        is_set = bool(super().set_search_properties(metric, mode, **spec))
        entries, self._entries = self._entries, []
        self._tell(entries)
        return is_set

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put a trial into the bracket that is being filled, or back into its own."""
        past = self._past.pop(trial.trial_id, None)
        if past is None:
            super().on_trial_add(tune_controller, trial)
        else:
            is_live = self.is_live(past)
            self.replace(past, trial, past.result)
            if not is_live:
                self._lost.append(trial)
                trial.set_status(Trial.PAUSED)
                return
            if past.waits:
                self._late.append(self.bracket_of(trial))
                trial.set_status(Trial.PAUSED)
                return
        if trial.status == Trial.PAUSED:
            self.allow_to_continue(trial)  # it waits for its turn

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Do what was left undone, then as ever."""
        lost, self._lost = self._lost, []
        for trial in lost:
            tune_controller.stop_trial(trial)
        late, self._late = self._late, []
        for bracket in late:
            # While a trial's place was kept, the others may have come to the milestone, too.
            self.finish_round(tune_controller, bracket)
        return super().choose_trial_to_run(tune_controller)

    def _tell(self, entries: Sequence[TrialRecord]) -> None:
        """Go through all that happened, in its order."""
        events: list[tuple[float, _Past, Evaluation | None]] = []
        for entry in entries:
            past = self._past[entry.name] = _Past(entry.name)
            events.append((entry.begun, past, None))
            # Ray Tune hands a trial's last result to no scheduler: the trial is over.
            heard = entry.evaluations[:-1] if entry.state == "finished" else entry.evaluations
            events += [(evaluation.time, past, evaluation) for evaluation in heard]
            if entry.state in ENDED:
                last = entry.evaluations[-1].time if entry.evaluations else entry.begun
                events.append((max(last, entry.ended or 0.0), past, None))
        for _, past, evaluation in sorted(events, key=lambda event: event[0]):
            if self.bracket_of(past) is None:
                super().on_trial_add(None, past)
            elif self.is_live(past):
                self._happen(past, evaluation)
        for past in self._past.values():
            self._keep_place(past)
        self.stop_filling()  # trials that come now would be past its milestones

    def _happen(self, past: _Past, evaluation: Evaluation | None) -> None:
        """A trial was evaluated, or is over."""
        controller = SimpleNamespace(stop_trial=self.remove)
        if evaluation is None:
            self.on_trial_remove(controller, past)
            return
        if self.is_paused(past):
            return  # workers that are on their way past a milestone log what nobody hears
        past.status = Trial.RUNNING
        past.best = max(past.best, evaluation.score)
        result = self.make_result(evaluation.epoch, past.best)
        action = BracketHyperBand.on_trial_result(self, controller, past, result)
        past.status = Trial.PAUSED if action == TrialScheduler.PAUSE else Trial.RUNNING

    def _keep_place(self, past: _Past) -> None:
        """Let a bracket wait for a trial that comes back, however far it had come."""
        if self.is_live(past):
            past.waits = self.is_paused(past)
            past.result = self.take_result(past)
            past.status = Trial.RUNNING  # nobody is to choose it
