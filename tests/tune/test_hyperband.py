"""HyperBand over several sessions: a killed search stops the trials it would have stopped."""

from types import SimpleNamespace

import pytest

from raybert.tune.schedulers import SCHEDULERS
from raybert.tune.schedulers.scheduler import SchedulerConfig
from raybert.tune.search_session import SearchSession
from raybert.tune.trial_store import Evaluation, TrialRecord

#: The score of each trial, the same at every epoch.
QUALITY = [0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2, 0.6, 0.4, 0.55, 0.65]
EPOCHS = 9


class Trial:
    """A trial as the scheduler sees it."""

    is_saving = False

    def __init__(self, record, lost=0):
        self.record, self.trial_id, self.status = record, record.name, "PENDING"
        self.epoch = max(0, int(record.epoch) - lost)  # of its last checkpoint
        self.best = record.score

    def set_status(self, status):
        self.status = status


class Killed(Exception):
    pass


class Search:
    """Ray Tune's loop, one evaluation at a time, until it is killed or over."""

    def __init__(self, records, at_once=2, lost=0):
        self.records, self.trials = records, []
        source = SimpleNamespace(trials=list(records))
        self.session = SearchSession(source, at_once, starts_all=True)
        config = SchedulerConfig(kind="hyperband", reduction=3)
        self.scheduler = SCHEDULERS["hyperband"](config).build(None, float(EPOCHS), self.session)
        assert self.scheduler.set_search_properties("best", "max")
        self.clock = 100.0 * (1 + max((e.time for x in records for e in x.evaluations), default=0))
        self.lost = lost

    def add(self, record):
        record.started = record.started or self.tick()
        trial = Trial(record, self.lost)
        if self.session.is_full:
            trial.set_status("PAUSED")
        self.session.running[record.name] = trial
        self.trials.append(trial)
        self.scheduler.on_trial_add(self, trial)

    def tick(self):
        self.clock += 1
        return self.clock

    def get_trials(self):
        return self.trials

    def stop_trial(self, trial):
        if trial.status != "TERMINATED":
            self.scheduler.on_trial_remove(self, trial)
            self.end(trial, "stopped")

    def end(self, trial, state):
        trial.status, trial.record.state, trial.record.ended = "TERMINATED", state, self.clock
        del self.session.running[trial.trial_id]

    def run(self, new, kill_after=None):
        for record in [*(e for e in self.records if e.state == "waiting"), *new]:
            self.add(record)
        count = 0
        while self.session.running:
            while (chosen := self.scheduler.choose_trial_to_run(self)) is not None:
                if chosen.status == "PENDING":  # it starts below, as in Ray Tune
                    break
                chosen.set_status("PENDING")
            for trial in self.trials:
                if trial.status == "PENDING":
                    trial.set_status("RUNNING")
            running = [t for t in self.trials if t.status == "RUNNING"]
            assert running, "all trials wait for each other"
            for trial in running:
                self.advance(trial)
                count += 1
                if count == kill_after:
                    raise Killed

    def advance(self, trial):
        trial.epoch += 1
        score = QUALITY[int(trial.trial_id)]
        trial.best = max(trial.best, score)
        evaluations = [e for e in trial.record.evaluations if e.step < trial.epoch]
        found = Evaluation(trial.epoch, float(trial.epoch), score, score, 0.5, self.tick())
        trial.record.evaluations = [*evaluations, found]
        result = {"epoch": float(trial.epoch), "best": trial.best}
        if trial.epoch == EPOCHS:
            self.scheduler.on_trial_complete(self, trial, result)
            self.end(trial, "finished")
            return
        action = self.scheduler.on_trial_result(self, trial, result)
        if action == "PAUSE":
            trial.set_status("PAUSED")
        elif action == "STOP":
            self.scheduler.on_trial_complete(self, trial, result)
            self.end(trial, "stopped")


def new_records():
    return [TrialRecord(f"{number:04d}", {}, 0) for number in range(len(QUALITY))]


def outcome(records):
    return {e.name: (e.state, e.epoch) for e in records}


@pytest.fixture(scope="module")
def undisturbed():
    records = new_records()
    Search([]).run(records)
    return outcome(records)


def test_brackets_stop_their_worse_trials_at_milestones(undisturbed):
    """All of the first 3 trials finish, the best 2 of the next 5, and one of the last 3."""
    assert undisturbed == {
        **{f"{n:04d}": ("finished", 9.0) for n in (0, 1, 2, 3, 5, 10)},
        **{f"{n:04d}": ("stopped", 3.0) for n in (4, 6, 7, 8, 9)},
    }


def killed_and_resumed(kill_after, *, lost=0, unrecorded=False):
    """Kill a search, then run it to its end; returns the outcome of each trial.

    Args:
        kill_after: evaluations before the kill.
        lost: epochs of each trial after its last checkpoint.
        unrecorded: whether the trials that were stopped last are not recorded as stopped.

    Returns None if the search has ended before.
    """
    records = new_records()
    first = Search([])
    try:
        first.run(records, kill_after)
    except Killed:
        for record in records:
            if unrecorded and record.state == "stopped" and record.ended == first.clock:
                record.state, record.ended = "waiting", None
        Search(records, lost=lost).run([])
        return outcome(records)
    return None


@pytest.mark.parametrize("how", [{}, {"lost": 1}, {"unrecorded": True}])
def test_a_search_killed_at_any_point_stops_the_trials_it_would_have_stopped(undisturbed, how):
    for kill_after in range(1, 200):
        found = killed_and_resumed(kill_after, **how)
        if found is None:
            break
        assert found == undisturbed, kill_after
    assert 40 < kill_after < 199


def test_later_trials_start_new_brackets(undisturbed):
    """A search that gets more trials fills its last bracket, then starts new ones."""
    records = new_records()
    Search(records[:0]).run(records[:8])
    assert outcome(records[:8]) == {k: v for k, v in undisturbed.items() if k < "0008"}
    Search(records[:8]).run(records[8:])
    assert outcome(records) == undisturbed
