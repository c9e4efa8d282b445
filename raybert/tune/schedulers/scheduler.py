"""What a search needs to know of a scheduler, and the limits that every scheduler keeps.

Ray Tune is imported when a scheduler is built: a configuration is checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from raybert.config import KeyOf, Settings
from raybert.tune.space import Space

if TYPE_CHECKING:
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    from raybert.tune.search_session import SearchSession


#: The schedulers by their names in `tune.scheduler.kind`; the package's `__init__` fills it.
SCHEDULERS: dict[str, type[SearchScheduler]] = {}


class SchedulerConfig(Settings):
    """Which trials are stopped early."""

    kind: Annotated[str, KeyOf(SCHEDULERS)] = Field(
        "asha",
        description="none: trains every trial to its end; asha: stops the worse trials at each "
        "rung (arXiv 1810.05934); hyperband: the same in brackets (arXiv 1603.06560); pbt: the "
        "worst trials copy weights and settings of the best (arXiv 1711.09846)",
    )
    grace_epochs: float = Field(
        1.0, gt=0, description="asha: epochs of the first rung; no trial is stopped before it"
    )
    reduction: float = Field(
        3.0,
        gt=1,
        description="asha, hyperband: one in so many trials continues past a rung, and each rung "
        "is so many times longer than the one before",
    )
    interval_epochs: float = Field(1.0, gt=0, description="pbt: epochs between two exploits")
    quantile: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="pbt: share of trials that are replaced, and share that they copy from",
    )


class SearchScheduler:
    """Checks a scheduler's configuration and builds Ray Tune's scheduler from it."""

    metric: ClassVar[str] = "best"  # the key of a trial's result that trials are compared by
    has_rungs: ClassVar[bool] = False  # compares trials at fixed epochs
    starts_all: ClassVar[bool] = False  # more trials than run at a time; they take turns
    exploits: ClassVar[bool] = False  # trials continue from other trials' checkpoints

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config

    def check_space(self, space: Space) -> None:
        """Reject a search space that the scheduler can't work on; the ConfigError names the key."""

    def check_epochs(self, longest: float) -> None:
        """Reject a configuration in which even the longest trial ends before any decision."""

    def build(self, space: Space | None, longest: float, session: SearchSession) -> TrialScheduler:
        """Build Ray Tune's scheduler; it learns the results of the session's earlier trials.

        Only pbt changes values, inside the `space`; `longest` is in epochs.
        """
        raise NotImplementedError


class NoScheduler(SearchScheduler):
    """Every trial is trained to its end, in the order in which they were proposed."""

    def build(self, space: Space | None, longest: float, session: SearchSession) -> TrialScheduler:
        """Build Ray Tune's first-in, first-out scheduler."""
        from ray.tune.schedulers import FIFOScheduler

        return limited(FIFOScheduler, session)()


def limited(kind: type[TrialScheduler], session: SearchSession) -> type[TrialScheduler]:
    """Subclass a Ray Tune scheduler: at most as many trials as fit, and until the deadline."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler

    class Limited(kind):  # type: ignore[misc]
        def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
            if session.is_ending:
                for trial in list(tune_controller.get_trials()):
                    if trial.status == Trial.PAUSED:
                        tune_controller.stop_trial(trial)
            chosen = super().choose_trial_to_run(tune_controller)
            resumes = chosen is not None and chosen.status == Trial.PAUSED
            return None if resumes and session.is_full else chosen

        def on_trial_result(
            self, tune_controller: Any, trial: Trial, result: dict[str, Any]
        ) -> str:
            if session.is_out_of_time:
                return str(TrialScheduler.STOP)
            return str(super().on_trial_result(tune_controller, trial, result))

    return Limited
