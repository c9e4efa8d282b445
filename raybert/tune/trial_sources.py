"""The trials of a search, chosen by a sampler, and trials that are known in advance."""

from __future__ import annotations

from raybert.tune.samplers import Sampler
from raybert.tune.space import Values
from raybert.tune.trial_store import TrialRecord, TrialStore


class SampledTrials:
    """Trials of earlier sessions first, then the start values, then the sampler's proposals."""

    def __init__(
        self, store: TrialStore, sampler: Sampler, start: list[Values], limit: int, seed: int
    ) -> None:
        """Read the trials of earlier sessions and pass them to the sampler.

        Args:
            store: the search's trials.
            sampler: proposes values after the start values.
            start: the values of the first trials.
            limit: the number of trials in all.
            seed: the training seed of every trial: trials differ only in their values.
        """
        self._store, self._sampler = store, sampler
        self._start, self._limit, self._seed = start, limit, seed
        self.trials = store.read_all()
        self._unfinished = [trial for trial in self.trials if trial.state == "waiting"]
        for trial in self.trials:
            is_waiting = trial.state == "waiting"
            (sampler.on_trial_start if is_waiting else sampler.on_trial_end)(trial)

    def next(self) -> TrialRecord | None:
        """The next trial to run; None: there are no more."""
        if self._unfinished:
            return self._unfinished.pop(0)
        number = len(self.trials)
        if number >= self._limit:
            return None
        values = self._start[number] if number < len(self._start) else None
        if values is None:
            values = self._sampler.propose(number)
        if values is None:
            return None
        trial = self._store.create(f"{number:04d}", values, self._seed)
        self.trials.append(trial)
        self._sampler.on_trial_start(trial)
        return trial

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Pass the result to the sampler."""
        self._sampler.on_trial_end(trial)


class FixedTrials:
    """Trials that are known in advance: the name, the values and the seed of each."""

    def __init__(
        self, store: TrialStore, wanted: list[tuple[str, Values, int]], *, retry: bool = False
    ) -> None:
        """Read which of them were run before; `retry` runs those that failed again."""
        known = {trial.name: trial for trial in store.read_all()}
        self._store = store
        self._new = [w for w in wanted if w[0] not in known]
        names = {name for name, _, _ in wanted}
        self.trials = [trial for trial in known.values() if trial.name in names]
        for trial in self.trials:
            if retry and trial.state == "failed":
                store.reopen(trial)
        self._unfinished = [trial for trial in self.trials if trial.state == "waiting"]

    def next(self) -> TrialRecord | None:
        """The next trial to run; None: there are no more."""
        if self._unfinished:
            return self._unfinished.pop(0)
        if not self._new:
            return None
        trial = self._store.create(*self._new.pop(0))
        self.trials.append(trial)
        return trial

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Nothing depends on the results."""
