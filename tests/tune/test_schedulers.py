"""Schedulers: results of earlier sessions, rejected configurations, the deadline."""

from types import SimpleNamespace

import pytest

from raybert.errors import ConfigError
from raybert.tune.schedulers import SCHEDULERS
from raybert.tune.schedulers.scheduler import SchedulerConfig
from raybert.tune.search_session import SearchSession
from raybert.tune.trial_store import Evaluation, TrialRecord


def make_scheduler(session, **settings):
    config = SchedulerConfig(**settings)
    scheduler = SCHEDULERS[config.kind](config).build(None, 4.0, session)
    scheduler.set_search_properties("best", "max")
    return scheduler


def scheduler_after(trials, **settings):
    """A scheduler that has seen these trials in an earlier session."""
    source = SimpleNamespace(trials=list(trials))
    return make_scheduler(SearchSession(source, 2), **settings)


def check_epochs(longest, **settings):
    config = SchedulerConfig(**settings)
    SCHEDULERS[config.kind](config).check_epochs(longest)


def ended_trial(name, *scores):
    evaluations = [Evaluation(n, float(n), s, s, 0.5, 0.0) for n, s in enumerate(scores, 1)]
    return TrialRecord(name, {}, 0, "finished", evaluations=evaluations)


def decide(scheduler, epoch, best):
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"epoch": epoch, "best": best})


def test_asha_knows_the_scores_of_earlier_sessions():
    before = [ended_trial("0000", 0.5, 0.9), ended_trial("0001", 0.8), ended_trial("0002", 0.7)]
    assert decide(scheduler_after(before, kind="asha", reduction=3), 1.0, 0.6) == "STOP"
    assert decide(scheduler_after(before, kind="asha", reduction=3), 1.0, 0.85) == "CONTINUE"
    assert decide(scheduler_after([], kind="asha", reduction=3), 1.0, 0.6) == "CONTINUE"


def test_no_trial_is_stopped_before_the_first_rung():
    before = [ended_trial("0000", 0.9), ended_trial("0001", 0.9), ended_trial("0002", 0.9)]
    scheduler = scheduler_after(before, kind="asha", grace_epochs=1.0)
    assert decide(scheduler, 0.9, 0.1) == "CONTINUE"


def test_a_scheduler_that_could_stop_no_trial_is_rejected():
    with pytest.raises(ConfigError, match=r"tune.scheduler.grace_epochs=5 is past the longest .*4"):
        check_epochs(4.0, kind="asha", grace_epochs=5.0)
    with pytest.raises(
        ConfigError, match=r"hyperband stops no trial within 2 epochs .*reduction=3"
    ):
        check_epochs(2.0, kind="hyperband", reduction=3)
    check_epochs(4.0, kind="asha", grace_epochs=4.0)
    check_epochs(2.5, kind="hyperband", reduction=3)


def test_all_trials_are_stopped_at_the_deadline():
    for kind in ("none", "asha"):
        source = SimpleNamespace(trials=[])
        session = SearchSession(source, 1, deadline=0.0)
        assert decide(make_scheduler(session, kind=kind), 1.0, 0.9) == "STOP"
