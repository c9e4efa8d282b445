"""Private parts of Ray Tune: the brackets of its schedulers, for trials of earlier sessions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, HyperBandScheduler

#: Tune's new console output can't be silenced; "0" selects the old one.
NEW_OUTPUT = "RAY_AIR_NEW_OUTPUT"


class BracketHyperBand(HyperBandScheduler):  # type: ignore[misc]  # of an untyped package
    """HyperBand with access to its brackets.

    A bracket is a group of trials that pause at a milestone until all have reached it; then the
    worse ones are stopped. A live trial is one that is not stopped, with its last result.
    """

    def bracket_of(self, trial: Any) -> Any:
        """The bracket of a trial; None before the trial was added."""
        return self._trial_info[trial][0] if trial in self._trial_info else None

    def is_live(self, trial: Any) -> bool:
        """Whether a trial is neither stopped nor over."""
        return trial in self._trial_info[trial][0]._live_trials

    def is_paused(self, trial: Any) -> bool:
        """Whether a trial waits at a milestone for the others of its bracket."""
        waiting = self._trial_info[trial][0].trials_to_unpause
        return trial.status == Trial.PAUSED and trial not in waiting

    def allow_to_continue(self, trial: Any) -> None:
        """Let a paused trial be chosen to run."""
        self._trial_info[trial][0].trials_to_unpause.add(trial)

    def take_result(self, trial: Any) -> dict[str, Any] | None:
        """Take a live trial's last result from it, so that its bracket waits for another."""
        bracket = self._trial_info[trial][0]
        result: dict[str, Any] | None = bracket._live_trials[trial]
        bracket._live_trials[trial] = None
        bracket.trials_to_unpause.discard(trial)
        return result

    def replace(self, old: Any, new: Any, result: dict[str, Any] | None) -> None:
        """Give the place of a trial, live or not, to another one, with a last result."""
        bracket, band = self._trial_info.pop(old)
        self._trial_info[new] = bracket, band
        if old in bracket._live_trials:
            bracket._live_trials = {
                (new if trial is old else trial): result if trial is old else other
                for trial, other in bracket._live_trials.items()
            }
            bracket._all_trials = [new if trial is old else trial for trial in bracket._all_trials]

    def remove(self, trial: Any) -> None:
        """Take a trial out of its bracket."""
        self._trial_info[trial][0].cleanup_trial(trial)

    def make_result(self, time: float, score: float) -> dict[str, Any]:
        """A result as the scheduler reads it."""
        return {self._time_attr: time, self._metric: score}

    def finish_round(self, tune_controller: Any, bracket: Any) -> None:
        """Stop the worse trials of a bracket if all have reached the milestone."""
        if bracket.cur_iter_done():
            self._process_bracket(tune_controller, bracket)

    def stop_filling(self) -> None:
        """Open a new bracket for the next trial if the present one has begun or is full."""
        bracket = self._state["bracket"]
        if bracket is not None and (
            bracket._n != bracket._n0 or len(bracket._all_trials) == bracket._n0
        ):
            self._state["bracket"] = None


def add_asha_result(
    scheduler: AsyncHyperBandScheduler, trial: str, time: float, score: float
) -> None:
    """Add a result of an earlier session's trial to an ASHA scheduler of one bracket."""
    [bracket] = scheduler._brackets
    bracket.on_result(SimpleNamespace(trial_id=trial), time, score)
