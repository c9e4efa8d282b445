"""Which values come next: at random, along a grid, or as Optuna's TPE learns from trials before.

A proposal depends on the search's seed, its own number and the trials that have ended, and on
nothing that a process would have to remember: a search that was killed goes on as it would have.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from raybert.data.keyed import key_of
from raybert.errors import ConfigError
from raybert.tune.space import Dimension, Space, Values
from raybert.tune.trial_store import TrialRecord, TrialStore

if TYPE_CHECKING:
    import optuna

_REDRAWS = 100  # where the configuration refuses what was drawn

Accepts = Callable[[Values], bool]


class Sampler(Protocol):
    """A way to choose values."""

    def propose(self, number: int) -> Values | None:
        """The values of a trial by its number; None: there are no more."""

    def begin(self, entry: TrialRecord) -> None:
        """Hear of a trial that runs, or will again."""

    def learn(self, entry: TrialRecord) -> None:
        """Hear of a trial that has ended."""


class RandomSampler:
    """Draws each trial by itself: the same for any order, number of workers or scheduler."""

    def __init__(self, space: Space, seed: int, accepts: Accepts) -> None:
        """Draw from a space what the configuration accepts."""
        self._space, self._seed, self._accepts = space, seed, accepts

    def propose(self, number: int) -> Values | None:
        """The values of a trial by its number."""
        draws = random.Random(key_of("trial", self._seed, number))
        for _ in range(_REDRAWS):
            values = self._space.draw(draws)
            if self._accepts(values):
                return values
        raise _refused()

    def begin(self, entry: TrialRecord) -> None:
        """Learns nothing."""

    def learn(self, entry: TrialRecord) -> None:
        """Learns nothing."""


class GridSampler:
    """Goes through the combinations of the dimensions' points."""

    def __init__(self, space: Space, first: int, accepts: Accepts, but: list[Values]) -> None:
        """Number the accepted points from `first` on, but for those of trials before."""
        points = [values for values in space.grid() if accepts(values)]
        if not points:
            raise _refused()
        self._points = [values for values in points if values not in but]
        self._first = first

    def __len__(self) -> int:
        return len(self._points)

    def propose(self, number: int) -> Values | None:
        """The values of a trial by its number."""
        at = number - self._first
        return self._points[at] if at < len(self._points) else None

    def begin(self, entry: TrialRecord) -> None:
        """Learns nothing."""

    def learn(self, entry: TrialRecord) -> None:
        """Learns nothing."""


class TpeSampler:
    """Optuna's tree-structured Parzen estimator (arXiv 2304.11127).

    Trials that were stopped count as Optuna's pruned ones do: by the best that they reached.
    """

    def __init__(self, space: Space, seed: int, startup: int, accepts: Accepts) -> None:
        """Draw the first `startup` trials at random, and learn from then on."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._seed, self._accepts = space, seed, accepts
        self._startup = startup
        self._study = optuna.create_study(direction="maximize")
        self._asked: dict[str, optuna.trial.Trial] = {}

    def propose(self, number: int) -> Values | None:
        """The values of a trial by its number, given what has ended."""
        import optuna

        for attempt in range(_REDRAWS):
            self._study.sampler = optuna.samplers.TPESampler(
                seed=key_of("trial", self._seed, number, attempt) % 2**32,
                n_startup_trials=self._startup,
            )
            trial = self._study.ask()
            values = self._space.walk(lambda d, trial=trial: _suggest(trial, d))  # type: ignore[misc]
            # The trial begins once it is written down: `begin` adds it under its name.
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if self._accepts(values):
                return values
        raise _refused()

    def begin(self, entry: TrialRecord) -> None:
        """Keep away from what is being tried."""
        if self._space.contains(entry.values):
            self._study.enqueue_trial(self._coded(entry.values))
            trial = self._study.ask()
            self._space.walk(lambda d: _suggest(trial, d))
            self._asked[entry.name] = trial

    def learn(self, entry: TrialRecord) -> None:
        """Take a trial's score into account."""
        import optuna

        if entry.name not in self._asked:
            self.begin(entry)
        trial = self._asked.pop(entry.name, None)
        if trial is None:  # the configured values, and they lie outside the space
            return
        best = entry.best
        if best is None or entry.state == "failed":
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif entry.state == "finished":
            self._study.tell(trial, best.score)
        else:
            trial.report(best.score, entry.evaluations[-1].step)
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def _coded(self, values: Values) -> dict[str, Any]:
        """Values as Optuna has them: a choice is its number, for not all are its kinds."""
        return self._space.walk(
            lambda d: d.choices.index(values[d.key]) if d.kind == "choice" else values[d.key]
        )


def _suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        numbers = list(range(len(dimension.choices)))
        return dimension.choices[int(trial.suggest_categorical(dimension.key, numbers))]
    if dimension.is_integer:
        low, high = int(dimension.low), int(dimension.high)
        return trial.suggest_int(dimension.key, low, high, log=dimension.is_log)
    return trial.suggest_float(
        dimension.key, float(dimension.low), float(dimension.high), log=dimension.is_log
    )


def _refused() -> ConfigError:
    return ConfigError(
        "tune.space: the configuration refuses what is drawn from it, time and again; try one "
        "with `raybert config --set KEY=VALUE`, and narrow the ranges"
    )


class SampledTrials:
    """The trials of a search: those that were begun, the start values, then what is proposed."""

    def __init__(
        self, ledger: TrialStore, proposer: Sampler, start: list[Values], limit: int, seed: int
    ) -> None:
        """Read what the storage knows.

        Args:
            ledger: the search's trials.
            proposer: chooses values once the start values are through.
            start: the values of the first trials.
            limit: how many trials there are to be in all.
            seed: of every trial: they differ in their values alone.
        """
        self._ledger, self._proposer = ledger, proposer
        self._start, self._limit, self._seed = start, limit, seed
        self.entries = ledger.entries()
        self._unfinished = [e for e in self.entries if e.state == "waiting"]
        for entry in self.entries:
            (proposer.begin if entry.state == "waiting" else proposer.learn)(entry)

    def next(self) -> TrialRecord | None:
        """The next trial to run; None: there are no more."""
        if self._unfinished:
            return self._unfinished.pop(0)
        number = len(self.entries)
        if number >= self._limit:
            return None
        values = self._start[number] if number < len(self._start) else None
        if values is None:
            values = self._proposer.propose(number)
        if values is None:
            return None
        entry = self._ledger.open(f"{number:04d}", values, self._seed)
        self.entries.append(entry)
        self._proposer.begin(entry)
        return entry

    def end(self, entry: TrialRecord) -> None:
        """Learn from a trial that has ended."""
        self._proposer.learn(entry)


class FixedTrials:
    """Trials that are known beforehand: name, values and seed of each."""

    def __init__(
        self, ledger: TrialStore, wanted: list[tuple[str, Values, int]], *, retry: bool = False
    ) -> None:
        """Read which of them the storage knows already; `retry` those of them that failed."""
        known = {entry.name: entry for entry in ledger.entries()}
        self._ledger = ledger
        self._new = [w for w in wanted if w[0] not in known]
        names = {name for name, _, _ in wanted}
        self.entries = [entry for entry in known.values() if entry.name in names]
        for entry in self.entries:
            if retry and entry.state == "failed":
                ledger.reopen(entry)
        self._unfinished = [e for e in self.entries if e.state == "waiting"]

    def next(self) -> TrialRecord | None:
        """The next trial to run; None: there are no more."""
        if self._unfinished:
            return self._unfinished.pop(0)
        if not self._new:
            return None
        entry = self._ledger.open(*self._new.pop(0))
        self.entries.append(entry)
        return entry

    def end(self, entry: TrialRecord) -> None:
        """Nothing to learn."""
