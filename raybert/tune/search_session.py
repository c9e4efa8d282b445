"""One session of a search: which trial runs next, and how those that ran have ended.

`trial` is Ray Tune's object here, `record` the TrialRecord of the same trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.tune.experiment import Trial

from raybert.tune.samplers import Sampler
from raybert.tune.space import Values
from raybert.tune.trial_store import ENDED, Evaluation, TrialRecord, TrialStore

OUT_OF_TIME = "time limit reached"  # the reason of trials that were stopped at the deadline
_LAST_WRITE_SECONDS = 60  # after the end of a trial, in which its worker may still write files


OnTrial = Callable[[TrialRecord], None]  # called in Ray Tune's thread


class TrialSource:
    """Gives the trials of a session: unfinished ones of earlier sessions first, then new ones."""

    retries = False  # whether a later session resumes trials that have failed

    def __init__(self, store: TrialStore, trials: list[TrialRecord], limit: int) -> None:
        self.store = store
        self.trials = trials  # those of earlier sessions, and those started since
        self.limit = limit  # trials in all
        self._unfinished = [trial for trial in trials if trial.state == "waiting"]

    def next(self) -> TrialRecord | None:
        """The next trial to run; None: there are no more."""
        if self._unfinished:
            return self._unfinished.pop(0)
        new = self._next_new()
        if new is None:
            return None
        trial = self.store.create(*new)
        self.trials.append(trial)
        return trial

    def _next_new(self) -> tuple[str, Values, int] | None:
        raise NotImplementedError

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Called when a trial has ended."""


class SampledTrials(TrialSource):
    """The start values, then the sampler's proposals, all with one training seed."""

    def __init__(
        self, store: TrialStore, sampler: Sampler, start: list[Values], limit: int, seed: int
    ) -> None:
        super().__init__(store, store.read_all(), limit)
        self._sampler, self._start, self._seed = sampler, start, seed
        for trial in self.trials:
            is_waiting = trial.state == "waiting"
            (sampler.on_trial_start if is_waiting else sampler.on_trial_end)(trial)

    def next(self) -> TrialRecord | None:
        """The next trial, which the sampler learns of if it is new."""
        known = len(self.trials)
        trial = super().next()
        if trial is not None and len(self.trials) > known:
            self._sampler.on_trial_start(trial)
        return trial

    def _next_new(self) -> tuple[str, Values, int] | None:
        number = len(self.trials)
        if number >= self.limit:
            return None
        is_start = number < len(self._start)
        values = self._start[number] if is_start else self._sampler.propose(number)
        return None if values is None else (f"{number:04d}", values, self._seed)

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Pass the result to the sampler."""
        self._sampler.on_trial_end(trial)


class FixedTrials(TrialSource):
    """Trials known in advance by name, values and seed; `retry` runs failed ones again."""

    def __init__(
        self, store: TrialStore, wanted: list[tuple[str, Values, int]], *, retry: bool = False
    ) -> None:
        known = {trial.name: trial for trial in store.read_all()}
        names = {name for name, _, _ in wanted}
        trials = [trial for trial in known.values() if trial.name in names]
        for trial in trials:
            if retry and trial.state == "failed":
                store.reopen(trial)
        super().__init__(store, trials, len(wanted))
        self.retries = retry
        self._new = [trial for trial in wanted if trial[0] not in known]

    def _next_new(self) -> tuple[str, Values, int] | None:
        return self._new.pop(0) if self._new else None


@dataclass
class SearchSession:
    """The state that Ray Tune's callbacks, the schedulers and the driver share."""

    source: TrialSource
    at_once: int  # trials that fit on the cluster
    deadline: float | None = None  # of time.monotonic
    on_evaluation: Sequence[OnTrial] = ()
    on_trial_end: Sequence[OnTrial] = ()
    starts_all: bool = False  # the scheduler needs all trials started; they take turns
    keeps_checkpoints: bool = False  # of ended trials: others may continue from them
    running: dict[str, Trial] = field(default_factory=dict)
    is_stopping: bool = False
    superseded: str | None = None  # the error, if another driver runs the same search
    _is_exhausted: bool = False
    _without_checkpoints: set[str] = field(default_factory=set)

    @property
    def is_out_of_time(self) -> bool:
        """Whether the search's deadline has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def is_ending(self) -> bool:
        """Whether running trials must stop."""
        return self.is_stopping or self.is_out_of_time

    @property
    def is_over(self) -> bool:
        """Whether no more trials will start."""
        return self._is_exhausted or self.is_ending

    @property
    def is_full(self) -> bool:
        """Whether as many trials run as fit on the cluster."""
        active = (Trial.PENDING, Trial.RUNNING)
        return sum(t.status in active for t in self.running.values()) >= self.at_once

    @property
    def is_idle(self) -> bool:
        """Whether no trial is running or paused."""
        return all(trial.is_finished() for trial in self.running.values())

    def next(self) -> TrialRecord | None:
        """The next trial, if there are resources for it or it may wait for its turn."""
        if self.is_over or (self.is_full and not self.starts_all):
            return None
        record = self.source.next()
        self._is_exhausted = record is None
        return record

    def record_of(self, trial: Trial) -> TrialRecord:
        """The record of Ray Tune's trial."""
        return next(record for record in self.source.trials if record.name == trial.trial_id)

    def on_result(self, trial: Trial, result: dict[str, Any]) -> None:
        """Record an evaluation."""
        record = self.record_of(trial)
        if "metric" in result and not {"failed", "interrupted"} & result.keys():
            evaluation = Evaluation.from_record({**result, "time": time.time()})
            record.evaluations.append(evaluation)
            for call in self.on_evaluation:
                call(record)

    def on_end(self, trial: Trial, error: str | None = None) -> None:
        """Record how a trial ended; one that was interrupted stays unfinished."""
        record, result = self.record_of(trial), trial.last_result or {}
        self.running.pop(record.name, None)
        has_ended = error is not None or result.get("ended") or result.get("failed")
        if result.get("interrupted") or (self.is_stopping and not has_ended):
            record.state = "waiting"  # the next session resumes it
            if "superseded" in result:
                self.superseded, self.is_stopping = str(result["superseded"]), True
            return
        store = self.source.store
        store.refresh(record)
        if error is not None or "failed" in result:
            store.close(record, "failed", error or str(result["failed"]))
        elif result.get("ended"):
            store.close(record, "finished")
        else:
            epoch = f"stopped at epoch {record.epoch:g}"
            store.close(record, "stopped", OUT_OF_TIME if self.is_out_of_time else epoch)
        self.source.on_trial_end(record)
        for call in self.on_trial_end:
            call(record)
        if not self.keeps_checkpoints:
            self.delete_checkpoints(_LAST_WRITE_SECONDS)

    def delete_checkpoints(self, age: float = 0.0) -> None:
        """Delete the checkpoints of trials that ended at least `age` seconds ago.

        The worker of a trial that has just ended may still write to them.
        """
        for record in self.source.trials:
            is_old = record.ended is not None and time.time() - record.ended >= age
            may_resume = self.source.retries and record.state == "failed"
            is_done = record.state in ENDED and not may_resume
            if is_old and is_done and record.name not in self._without_checkpoints:
                self._without_checkpoints.add(record.name)
                self.source.store.folder_of(record.name).delete("checkpoints")
