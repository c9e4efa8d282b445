"""Samplers: random search, grid search, and Optuna's TPE, which learns from earlier trials.

A proposal depends only on the search's seed, the trial's number and the trials that have ended, not
on the state of a process: a search that was killed resumes with the trials it would have run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raybert.data.keyed import key_of
from raybert.errors import ConfigError
from raybert.tune.space import Dimension, Space, Values
from raybert.tune.trial_store import TrialRecord

if TYPE_CHECKING:
    import optuna

_REDRAWS = 100  # draws until one is valid

Accepts = Callable[[Values], bool]  # whether values are valid together


class Sampler:
    """Proposes the values of trials. It may learn from their results; by default it does not."""

    def count(self, trials: int) -> int:
        """The number of trials, start values included, if `trials` are configured."""
        return trials

    def propose(self, number: int) -> Values | None:
        """The values of a trial by its number; None: there are no more."""
        raise NotImplementedError

    def on_trial_start(self, trial: TrialRecord) -> None:
        """Called when a trial starts, and for unfinished trials when a search is resumed."""

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Called when a trial has ended, and for ended trials when a search is resumed."""


class RandomSampler(Sampler):
    """Draws each trial independently of all others."""

    def __init__(self, space: Space, seed: int, accepts: Accepts) -> None:
        self._space, self._seed, self._accepts = space, seed, accepts

    def propose(self, number: int) -> Values | None:
        """Draw the values of a trial."""
        draws = random.Random(key_of("trial", self._seed, number))
        for _ in range(_REDRAWS):
            values = self._space.draw(draws)
            if self._accepts(values):
                return values
        raise _no_valid_values()


class GridSampler(Sampler):
    """Proposes every combination of the dimensions' points once."""

    def __init__(self, space: Space, start: list[Values], accepts: Accepts) -> None:
        points = [values for values in space.grid() if accepts(values)]
        if not points:
            raise _no_valid_values()
        self._points = [values for values in points if values not in start]
        self._first = len(start)

    def count(self, trials: int) -> int:
        """The start values and all points."""
        return self._first + len(self._points)

    def propose(self, number: int) -> Values | None:
        """The point of a trial."""
        index = number - self._first
        return self._points[index] if index < len(self._points) else None


class TpeSampler(Sampler):
    """Optuna's tree-structured Parzen estimator (arXiv 2304.11127); stopped: pruned."""

    def __init__(self, space: Space, seed: int, startup: int, accepts: Accepts) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._seed, self._accepts = space, seed, accepts
        self._startup = startup
        self._study = optuna.create_study(direction="maximize")
        self._running: dict[str, optuna.trial.Trial] = {}

    def propose(self, number: int) -> Values | None:
        """Sample the values of a trial, given the results so far."""
        import optuna

        for attempt in range(_REDRAWS):
            self._study.sampler = optuna.samplers.TPESampler(
                seed=key_of("trial", self._seed, number, attempt) % 2**32,
                n_startup_trials=self._startup,
            )
            trial = self._study.ask()
            values = self._space.walk(lambda d, trial=trial: _suggest(trial, d))  # type: ignore[misc]
            # `on_trial_start` adds the trial to the study once it is in the TrialStore.
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if self._accepts(values):
                return values
        raise _no_valid_values()

    def on_trial_start(self, trial: TrialRecord) -> None:
        """Add a running trial, so that the next proposals keep away from its values."""
        if self._space.contains(trial.values):
            self._study.enqueue_trial(self._optuna_values(trial.values))
            optuna_trial = self._study.ask()
            self._space.walk(lambda d: _suggest(optuna_trial, d))
            self._running[trial.name] = optuna_trial

    def on_trial_end(self, trial: TrialRecord) -> None:
        """Add a trial's score."""
        import optuna

        if trial.name not in self._running:
            self.on_trial_start(trial)
        optuna_trial = self._running.pop(trial.name, None)
        if optuna_trial is None:  # the configured values, if they are outside the space
            return
        best = trial.best
        if best is None or trial.state == "failed":
            self._study.tell(optuna_trial, state=optuna.trial.TrialState.FAIL)
        elif trial.state == "finished":
            self._study.tell(optuna_trial, best.score)
        else:
            optuna_trial.report(best.score, trial.evaluations[-1].step)
            self._study.tell(optuna_trial, state=optuna.trial.TrialState.PRUNED)

    def _optuna_values(self, values: Values) -> dict[str, Any]:
        """Optuna's values: a choice is its index, because Optuna does not support every type."""
        return self._space.walk(
            lambda d: d.choices.index(values[d.key]) if d.kind == "choice" else values[d.key]
        )


#: By their names in `tune.searcher`: (space, start values, seed, trials, check) -> sampler.
SAMPLERS: dict[str, Callable[[Space, list[Values], int, int, Accepts], Sampler]] = {
    "random": lambda space, start, seed, trials, accepts: RandomSampler(space, seed, accepts),
    "grid": lambda space, start, seed, trials, accepts: GridSampler(space, start, accepts),
    "tpe": lambda space, start, seed, trials, accepts: TpeSampler(
        space, seed, max(4, min(10, trials // 3)), accepts
    ),
}


def _suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        indices = list(range(len(dimension.choices)))
        return dimension.choices[int(trial.suggest_categorical(dimension.key, indices))]
    if dimension.is_integer:
        low, high = int(dimension.low), int(dimension.high)
        return trial.suggest_int(dimension.key, low, high, log=dimension.is_log)
    return trial.suggest_float(
        dimension.key, float(dimension.low), float(dimension.high), log=dimension.is_log
    )


def _no_valid_values() -> ConfigError:
    return ConfigError(
        "tune.space: the configuration refuses all values that are drawn from it; try one with "
        "`raybert config --set KEY=VALUE`, and narrow the ranges"
    )
