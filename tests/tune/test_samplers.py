"""Which values are tried next; a killed search resumes with the trials it would have run."""

import math

import pytest
from making import metrics_log

from raybert.errors import ConfigError, RaybertError
from raybert.pipeline.ensemble_stage import check_members
from raybert.storage.folder import Folder
from raybert.tune.samplers import GridSampler, RandomSampler, TpeSampler
from raybert.tune.search_session import FixedTrials, SampledTrials, SearchSession
from raybert.tune.space import Space
from raybert.tune.trial_store import TrialStore

SPACE = Space.parse(
    {
        "finetune.lr": {"log_uniform": [1e-5, 1e-1]},
        "finetune.epochs": {"integer": [1, 4]},
        "finetune.kind": {"choice": ["a", None]},
        "finetune.only_a": {"uniform": [0, 1], "when": {"finetune.kind": "a"}},
    }
)


def accept_all(values):
    return True


@pytest.fixture
def store(tmp_path):
    return TrialStore(Folder(tmp_path) / "trials")


def write_evaluations(store, name, scores, attempt=1):
    """Write the metrics log of a trial."""
    log = metrics_log(store.folder_of(name), attempt, 0)
    for step, score in enumerate(scores, 1):
        log.write(
            {"kind": "eval", "step": step, "epoch": step / 2, "score": score, "accuracy": score}
            | {"loss": 1.0}
        )
    log.close()


def run_trial(store, trials, score, state="finished"):
    trial = trials.next()
    write_evaluations(store, trial.name, [score / 2, score])
    store.refresh(trial)
    store.close(trial, state)
    trials.on_trial_end(trial)
    return trial


def test_random_draws_depend_only_on_the_seed_and_the_number():
    one, two = (RandomSampler(SPACE, 3, accept_all) for _ in range(2))
    drawn = [one.propose(number) for number in range(20)]
    assert [two.propose(number) for number in reversed(range(20))] == drawn[::-1]
    assert len({repr(values) for values in drawn}) == 20
    other = RandomSampler(SPACE, 4, accept_all)
    assert other.propose(0) != drawn[0]


def test_invalid_values_are_drawn_again():
    search = RandomSampler(SPACE, 0, lambda values: values["finetune.epochs"] == 4)
    assert {search.propose(n)["finetune.epochs"] for n in range(10)} == {4}
    with pytest.raises(ConfigError, match="refuses all values"):
        RandomSampler(SPACE, 0, lambda values: False).propose(0)
    with pytest.raises(ConfigError, match="refuses all values"):
        GridSampler(SPACE, [], lambda values: False)


def test_a_grid_leaves_out_the_start_values(store):
    first = SPACE.grid()[0]
    grid = GridSampler(SPACE, [first], accept_all)
    assert grid.count(99) == len(SPACE.grid())
    trials = SampledTrials(store, grid, [first], grid.count(99), seed=0)
    found = []
    while (trial := trials.next()) is not None:
        found.append(repr(trial.values))
    assert sorted(found) == sorted(repr(values) for values in SPACE.grid())


def test_the_first_trials_have_the_start_values(store):
    start = [{"finetune.lr": 1e-3}, {"finetune.lr": 2e-3}]
    trials = SampledTrials(store, RandomSampler(SPACE, 0, accept_all), start, 4, seed=7)
    found = [trials.next() for _ in range(5)]
    assert found[-1] is None
    assert [trial.name for trial in found[:-1]] == ["0000", "0001", "0002", "0003"]
    assert [trial.values for trial in found[:2]] == start
    assert {trial.seed for trial in found[:-1]} == {7}


def test_a_killed_search_resumes_with_the_same_trials(store, tmp_path):
    """Finished ones stay, unfinished ones come first, and no trial runs twice."""

    def search(store=store):
        return SampledTrials(store, RandomSampler(SPACE, 0, accept_all), [{}], 6, seed=0)

    undisturbed = search(TrialStore(Folder(tmp_path) / "undisturbed"))
    expected = [undisturbed.next().values for _ in range(6)]
    first = search()
    run_trial(store, first, 0.5)
    started = [first.next() for _ in range(2)]  # then the driver is killed
    store.folder_of(started[1].name).write_json(
        "result.json", {}
    )  # ended, but the driver did not record it
    second = search()
    assert [trial.state for trial in second.trials] == ["finished", "waiting", "finished"]
    assert second.next().name == "0001"
    rest = [second.next() for _ in range(4)]
    assert [trial.name for trial in rest if trial] == ["0003", "0004", "0005"]
    assert [trial.values for trial in second.trials] == expected


def test_fixed_trials_run_once(store):
    wanted = [("0003-s1", {"a.b": 1}, 1), ("0003-s2", {"a.b": 1}, 2), ("0007-s1", {}, 1)]
    first = FixedTrials(store, wanted)
    trial = first.next()
    write_evaluations(store, trial.name, [0.5])
    store.close(trial, "finished")
    first.next()
    second = FixedTrials(store, wanted)
    assert [second.next().name for _ in range(2)] == ["0003-s2", "0007-s1"]
    assert second.next() is None
    assert [trial.seed for trial in second.trials] == [1, 2, 1]


# Optuna ------------------------------------------------------------------------------------------


@pytest.fixture
def tpe():
    pytest.importorskip("optuna", reason="optuna is not installed")
    return lambda seed=0: TpeSampler(SPACE, seed, 4, accept_all)


def quality(values):
    """A score that is best at lr 1e-3 with kind `a`."""
    distance = abs(math.log10(values["finetune.lr"]) + 3)
    return 1 - distance / 4 - (0.2 if values["finetune.kind"] is None else 0.0)


def test_tpe_proposes_values_inside_the_space(tpe, store):
    trials = SampledTrials(store, tpe(), [], 12, seed=0)
    while trials.next() is not None:
        pass
    assert len(trials.trials) == 12
    assert all(SPACE.contains(trial.values) for trial in trials.trials)


def test_tpe_learns_from_scores(tpe, store):
    """The last of 40 trials are better than random draws."""
    trials = SampledTrials(store, tpe(), [], 40, seed=0)
    for _ in range(40):
        trial = trials.next()
        write_evaluations(store, trial.name, [quality(trial.values)])
        store.refresh(trial)
        store.close(trial, "finished")
        trials.on_trial_end(trial)
    late = [trial.best.score for trial in trials.trials[-15:]]
    draws = RandomSampler(SPACE, 0, accept_all)
    random_scores = [quality(draws.propose(n)) for n in range(200)]
    assert sum(late) / 15 > sum(random_scores) / 200 + 0.1


def test_a_resumed_tpe_proposes_the_same_values(tpe, store):
    """Proposals depend on the trials in the store, not on the process."""
    trials = SampledTrials(store, tpe(), [{"finetune.lr": 99.0}], 20, seed=0)
    for state in ("finished", "stopped", "failed", "finished", "finished", "finished"):
        run_trial(store, trials, 0.5, state)
    running = trials.next()
    again = SampledTrials(store, tpe(), [{"finetune.lr": 99.0}], 20, seed=0)
    assert again.next().name == running.name
    assert again.next().values == trials.next().values


def test_tpe_proposals_depend_on_the_seed(tpe, store):
    assert tpe(0).propose(1) == tpe(0).propose(1) != tpe(1).propose(1)


def test_failed_fixed_trials_run_again_only_with_retry(store):
    wanted = [("s0", {}, 0), ("s1", {}, 1)]
    first = FixedTrials(store, wanted, retry=True)
    store.close(first.next(), "finished")
    store.close(first.next(), "failed", "its worker was lost")
    assert FixedTrials(store, wanted).next() is None
    second = FixedTrials(store, wanted, retry=True)
    again = second.next()
    assert (again.name, again.state, again.reason, again.ended) == ("s1", "waiting", "", None)
    assert second.next() is None
    assert [(e.name, e.state) for e in store.read_all()] == [("s0", "finished"), ("s1", "waiting")]
    with pytest.raises(RaybertError, match="member s1 failed: .* same command again to resume s1 "):
        store.close(again, "failed", "its worker was lost")
        check_members(second.trials)
    store.close(again, "finished")
    check_members(second.trials)


@pytest.mark.parametrize("retries", [False, True])
def test_failed_trials_keep_their_checkpoints_if_they_are_retried(store, retries):
    source = FixedTrials(store, [("s0", {}, 0), ("s1", {}, 1)], retry=retries)
    for state in ("finished", "failed"):
        trial = source.next()
        store.folder_of(trial.name).write_text("checkpoints/step.json", "x")
        store.close(trial, state)
    SearchSession(source, 1).delete_checkpoints()
    kept = [e.name for e in source.trials if store.folder_of(e.name).names("checkpoints")]
    assert kept == (["s1"] if retries else [])
