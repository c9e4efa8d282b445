"""HyperBand over several sessions: whenever it is killed, it stops the trials it would have."""

from types import SimpleNamespace

import pytest

from raybert.tune.schedulers.factory import make_scheduler
from raybert.tune.search_session import Session, TrialResources
from raybert.tune.settings import SchedulerConfig
from raybert.tune.trial_store import Evaluation, TrialRecord

#: The score of each trial, at every epoch alike: what it is by then follows from its end alone.
QUALITY = [0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2, 0.6, 0.4, 0.55, 0.65]
EPOCHS = 9


class Trial:
    """A trial as the scheduler sees it."""

    is_saving = False

    def __init__(self, entry, lost=0):
        self.entry, self.trial_id, self.status = entry, entry.name, "PENDING"
        self.epoch = max(0, int(entry.epoch) - lost)  # that its last checkpoint is of
        self.best = entry.score

    def set_status(self, status):
        self.status = status


class Killed(Exception):
    pass


class Search:
    """Ray Tune's loop, one evaluation at a time, until it is killed or over."""

    def __init__(self, entries, room=2, lost=0):
        self.entries, self.trials = entries, []
        source = SimpleNamespace(entries=list(entries))
        self.session = Session(
            source, ledger=None, room=TrialResources(room, 1.0, 0.0), all_at_once=True
        )
        config = SchedulerConfig(kind="hyperband", reduction=3)
        self.scheduler = make_scheduler(config, None, float(EPOCHS), self.session)
        assert self.scheduler.set_search_properties("best", "max")
        self.clock = 100.0 * (1 + max((e.time for x in entries for e in x.evaluations), default=0))
        self.lost = lost

    def add(self, entry):
        entry.begun = entry.begun or self.tick()
        trial = Trial(entry, self.lost)
        if self.session.is_full:
            trial.set_status("PAUSED")
        self.session.running[entry.name] = trial
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
        trial.status, trial.entry.state, trial.entry.ended = "TERMINATED", state, self.clock
        del self.session.running[trial.trial_id]

    def run(self, new, kill_after=None):
        for entry in [*(e for e in self.entries if e.state == "waiting"), *new]:
            self.add(entry)
        count = 0
        while self.session.running:
            while (chosen := self.scheduler.choose_trial_to_run(self)) is not None:
                if chosen.status == "PENDING":  # it is started below, as Ray Tune does by itself
                    break
                chosen.set_status("PENDING")
            for trial in self.trials:
                if trial.status == "PENDING":
                    trial.set_status("RUNNING")
            running = [t for t in self.trials if t.status == "RUNNING"]
            assert running, "all wait for each other"
            for trial in running:
                self.advance(trial)
                count += 1
                if count == kill_after:
                    raise Killed

    def advance(self, trial):
        trial.epoch += 1
        score = QUALITY[int(trial.trial_id)]
        trial.best = max(trial.best, score)
        evaluations = [e for e in trial.entry.evaluations if e.step < trial.epoch]
        found = Evaluation(trial.epoch, float(trial.epoch), score, score, 0.5, self.tick())
        trial.entry.evaluations = [*evaluations, found]
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


def new_entries():
    return [TrialRecord(f"{number:04d}", {}, 0) for number in range(len(QUALITY))]


def outcome(entries):
    return {e.name: (e.state, e.epoch) for e in entries}


@pytest.fixture(scope="module")
def undisturbed():
    entries = new_entries()
    Search([]).run(entries)
    return outcome(entries)


def test_brackets_stop_their_worse_trials_at_their_milestones(undisturbed):
    """Of the first 3 all are trained to the end, of the next 5 the best 2, of the last 3 one."""
    assert undisturbed == {
        **{f"{n:04d}": ("finished", 9.0) for n in (0, 1, 2, 3, 5, 10)},
        **{f"{n:04d}": ("stopped", 3.0) for n in (4, 6, 7, 8, 9)},
    }


def killed_and_resumed(kill_after, *, lost=0, unheard=False):
    """A search that is killed after so many evaluations, and then runs to its end.

    `lost` epochs of each trial come after its last checkpoint; `unheard`: the trials that were
    stopped last are not written down. Returns None where it was over before.
    """
    entries = new_entries()
    first = Search([])
    try:
        first.run(entries, kill_after)
    except Killed:
        for entry in entries:
            if unheard and entry.state == "stopped" and entry.ended == first.clock:
                entry.state, entry.ended = "waiting", None
        Search(entries, lost=lost).run([])
        return outcome(entries)
    return None


@pytest.mark.parametrize("how", [{}, {"lost": 1}, {"unheard": True}])
def test_a_search_killed_at_any_point_stops_the_trials_it_would_have(undisturbed, how):
    for kill_after in range(1, 200):
        found = killed_and_resumed(kill_after, **how)
        if found is None:
            break
        assert found == undisturbed, kill_after
    assert 40 < kill_after < 199


def test_later_trials_begin_brackets_of_their_own(undisturbed):
    """A search that is given more trials fills what is not full, and has new brackets then."""
    entries = new_entries()
    Search(entries[:0]).run(entries[:8])
    assert outcome(entries[:8]) == {k: v for k, v in undisturbed.items() if k < "0008"}
    Search(entries[:8]).run(entries[8:])
    assert outcome(entries) == undisturbed
