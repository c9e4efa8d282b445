"""Who goes on: Ray Tune's schedulers, within the room that there is, told of earlier sessions."""

from __future__ import annotations

import math
from typing import Any
from uuid import uuid4

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from raybert.cluster.internals.hooks import check
from raybert.cluster.internals.tune import add_asha_result
from raybert.errors import ConfigError
from raybert.tune.schedulers.hyperband import ResumableHyperBand
from raybert.tune.search_session import Session
from raybert.tune.settings import SchedulerConfig
from raybert.tune.space import Space
from raybert.tune.trial import EXCHANGE
from raybert.tune.trial_store import TrialRecord


def make_scheduler(
    config: SchedulerConfig, space: Space | None, most_epochs: float, session: Session
) -> TrialScheduler:
    """Build Ray Tune's scheduler; ASHA and HyperBand are told of what earlier sessions saw."""
    common: dict[str, Any] = {"time_attr": "epoch"}
    match config.kind:
        case "asha":
            scheduler = _bounded(AsyncHyperBandScheduler, session)(
                max_t=most_epochs,
                grace_period=config.grace_epochs,
                reduction_factor=config.reduction,
                stop_last_trials=False,
                **common,
            )
            for entry in session.source.entries if check("asha") else ():
                _replay(scheduler, entry)
        case "hyperband":
            resumed = check("hyperband")
            kind = ResumableHyperBand if resumed else HyperBandScheduler
            scheduler = _bounded(kind, session)(
                *([session.source.entries] if resumed else []),
                max_t=max(1, math.ceil(most_epochs)),
                reduction_factor=config.reduction,
                stop_last_trials=False,
                **common,
            )
        case "pbt":
            assert space is not None
            scheduler = _bounded(PopulationBasedTraining, session)(
                perturbation_interval=config.interval_epochs,
                hyperparam_mutations=_mutations(space),
                quantile_fraction=config.quantile,
                custom_explore_fn=lambda values: {**space.clip(values), EXCHANGE: uuid4().hex},
                log_config=False,
                **common,
            )
        case _:
            scheduler = _bounded(FIFOScheduler, session)()
    return scheduler


def check_scheduler(config: SchedulerConfig, most_epochs: float) -> None:
    """Refuse a scheduler that could stop no trial.

    Raises:
        ConfigError: it looks at trials for the first time when all are over.
    """
    if config.kind == "asha" and config.grace_epochs > most_epochs:
        raise ConfigError(
            f"tune.scheduler.grace_epochs={config.grace_epochs:g} is past the longest trial's "
            f"{most_epochs:g} epochs; lower it, or set tune.scheduler.kind=none"
        )
    if config.kind == "hyperband" and math.ceil(most_epochs) < config.reduction:
        raise ConfigError(
            f"tune.scheduler.kind=hyperband halves nothing in {most_epochs:g} epochs with "
            f"tune.scheduler.reduction={config.reduction:g}; train for as many epochs, lower that, "
            "or set tune.scheduler.kind=asha"
        )


def _bounded(kind: type[TrialScheduler], session: Session) -> type[TrialScheduler]:
    """A scheduler that wakes no more trials than there is room for, and none past the time."""

    class Bounded(kind):  # type: ignore[misc]
        def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
            if session.is_ending:
                for trial in list(tune_controller.get_trials()):
                    if trial.status == Trial.PAUSED:
                        tune_controller.stop_trial(trial)
            chosen = super().choose_trial_to_run(tune_controller)
            wakes = chosen is not None and chosen.status == Trial.PAUSED
            return None if wakes and session.is_full else chosen

        def on_trial_result(
            self, tune_controller: Any, trial: Trial, result: dict[str, Any]
        ) -> str:
            if session.out_of_time:
                return str(TrialScheduler.STOP)
            return str(super().on_trial_result(tune_controller, trial, result))

    return Bounded


def _replay(scheduler: AsyncHyperBandScheduler, entry: TrialRecord) -> None:
    """Tell a scheduler of an earlier session's evaluations, as if the trial were of this one."""
    best = -math.inf
    for evaluation in entry.evaluations:
        best = max(best, evaluation.score)
        add_asha_result(scheduler, entry.name, evaluation.epoch, best)


def _mutations(space: Space) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dimension in space.dimensions:
        low, high = dimension.low, dimension.high
        if dimension.kind == "choice":
            found[dimension.key] = list(dimension.choices)
        elif dimension.is_integer:
            draw = ray.tune.lograndint if dimension.is_log else ray.tune.randint
            found[dimension.key] = draw(int(low), int(high) + 1)
        else:
            draw = ray.tune.loguniform if dimension.is_log else ray.tune.uniform
            found[dimension.key] = draw(low, high)
    return found
