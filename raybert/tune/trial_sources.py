"""Where a session's trials come from: a sampler chooses them, or they are known in advance."""

from __future__ import annotations

from raybert.tune.samplers import Sampler
from raybert.tune.space import Values
from raybert.tune.trial_store import TrialRecord, TrialStore


class TrialSource:
    """Gives the trials of a session: unfinished ones of earlier sessions first, then new ones."""

    def __init__(self, store: TrialStore, trials: list[TrialRecord]) -> None:
        self._store = store
        self.trials = trials  # those of earlier sessions, and those started since
        self._unfinished = [trial for trial in trials if trial.state == "waiting"]

    def next(self) -> TrialRecord | None:
        """The next trial to run; None: there are no more."""
        if self._unfinished:
            return self._unfinished.pop(0)
        new = self._next_new()
        if new is None:
            return None
        trial = self._store.create(*new)
        self.trials.append(trial)
        return trial

    def _next_new(self) -> tuple[str, Values, int] | None:
        """The name, the values and the seed of the next new trial."""
        raise NotImplementedError

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Called when a trial has ended."""


class SampledTrials(TrialSource):
    """The start values, then the sampler's proposals, `limit` trials in all.

    All have one training seed: trials differ only in their values.
    """

    def __init__(
        self, store: TrialStore, sampler: Sampler, start: list[Values], limit: int, seed: int
    ) -> None:
        super().__init__(store, store.read_all())
        self._sampler, self._start, self._limit, self._seed = sampler, start, limit, seed
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
        if number >= self._limit:
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
        super().__init__(store, trials)
        self._new = [trial for trial in wanted if trial[0] not in known]

    def _next_new(self) -> tuple[str, Values, int] | None:
        return self._new.pop(0) if self._new else None
