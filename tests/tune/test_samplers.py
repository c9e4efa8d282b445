"""What is tried next, and that a search that was killed goes on with what it would have tried."""

import math

import pytest

from raybert.errors import ConfigError, RaybertError
from raybert.pipeline.ensemble_stage import check_members
from raybert.storage.folder import Folder
from raybert.train.metrics_log import MetricsLog
from raybert.tune.samplers import FixedTrials, GridSampler, RandomSampler, SampledTrials, TpeSampler
from raybert.tune.search_session import Session, TrialResources
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


def anything(values):
    return True


@pytest.fixture
def ledger(tmp_path):
    return TrialStore(Folder(tmp_path) / "trials")


def evaluated(ledger, name, scores, attempt=1):
    """Write what a trial's run would have."""
    log = MetricsLog(ledger.run(name), attempt, 0)
    for step, score in enumerate(scores, 1):
        log.write(
            {"kind": "eval", "step": step, "epoch": step / 2, "score": score, "accuracy": score}
            | {"loss": 1.0}
        )
    log.close()


def ended(ledger, trials, score, state="finished"):
    entry = trials.next()
    evaluated(ledger, entry.name, [score / 2, score])
    ledger.refresh(entry)
    ledger.close(entry, state)
    trials.end(entry)
    return entry


def test_random_draws_depend_on_the_number_alone():
    one, two = (RandomSampler(SPACE, 3, anything) for _ in range(2))
    drawn = [one.propose(number) for number in range(20)]
    assert [two.propose(number) for number in reversed(range(20))] == drawn[::-1]
    assert len({repr(values) for values in drawn}) == 20
    other = RandomSampler(SPACE, 4, anything)
    assert other.propose(0) != drawn[0]


def test_what_the_configuration_refuses_is_drawn_again():
    search = RandomSampler(SPACE, 0, lambda values: values["finetune.epochs"] == 4)
    assert {search.propose(n)["finetune.epochs"] for n in range(10)} == {4}
    with pytest.raises(ConfigError, match="refuses what is drawn from it"):
        RandomSampler(SPACE, 0, lambda values: False).propose(0)
    with pytest.raises(ConfigError, match="refuses what is drawn from it"):
        GridSampler(SPACE, 0, lambda values: False, but=[])


def test_a_grid_leaves_out_what_was_tried_first(ledger):
    first = SPACE.grid()[0]
    grid = GridSampler(SPACE, 1, anything, but=[first])
    assert len(grid) == len(SPACE.grid()) - 1
    trials = SampledTrials(ledger, grid, [first], 1 + len(grid), seed=0)
    found = []
    while (entry := trials.next()) is not None:
        found.append(repr(entry.values))
    assert sorted(found) == sorted(repr(values) for values in SPACE.grid())


def test_trials_begin_with_the_start_values(ledger):
    start = [{"finetune.lr": 1e-3}, {"finetune.lr": 2e-3}]
    trials = SampledTrials(ledger, RandomSampler(SPACE, 0, anything), start, 4, seed=7)
    found = [trials.next() for _ in range(5)]
    assert found[-1] is None
    assert [entry.name for entry in found[:-1]] == ["0000", "0001", "0002", "0003"]
    assert [entry.values for entry in found[:2]] == start
    assert {entry.seed for entry in found[:-1]} == {7}


def test_a_killed_search_goes_on_with_the_same_trials(ledger, tmp_path):
    """Finished ones stay, unfinished ones come first, none comes twice."""

    def search(ledger=ledger):
        return SampledTrials(ledger, RandomSampler(SPACE, 0, anything), [{}], 6, seed=0)

    undisturbed = search(TrialStore(Folder(tmp_path) / "undisturbed"))
    expected = [undisturbed.next().values for _ in range(6)]
    first = search()
    ended(ledger, first, 0.5)
    begun = [first.next() for _ in range(2)]  # and then the driver is killed
    ledger.run(begun[1].name).write_json("result.json", {})  # it was over, unheard
    second = search()
    assert [entry.state for entry in second.entries] == ["finished", "waiting", "finished"]
    assert second.next().name == "0001"
    rest = [second.next() for _ in range(4)]
    assert [entry.name for entry in rest if entry] == ["0003", "0004", "0005"]
    assert [entry.values for entry in second.entries] == expected


def test_what_is_wanted_is_run_once(ledger):
    wanted = [("0003-s1", {"a.b": 1}, 1), ("0003-s2", {"a.b": 1}, 2), ("0007-s1", {}, 1)]
    first = FixedTrials(ledger, wanted)
    entry = first.next()
    evaluated(ledger, entry.name, [0.5])
    ledger.close(entry, "finished")
    first.next()
    second = FixedTrials(ledger, wanted)
    assert [second.next().name for _ in range(2)] == ["0003-s2", "0007-s1"]
    assert second.next() is None
    assert [entry.seed for entry in second.entries] == [1, 2, 1]


# Optuna's ----------------------------------------------------------------------------------------


@pytest.fixture
def tpe():
    pytest.importorskip("optuna", reason="optuna is not installed")
    return lambda seed=0: TpeSampler(SPACE, seed, 4, anything)


def quality(values):
    """Best at lr 1e-3 with kind `a`."""
    distance = abs(math.log10(values["finetune.lr"]) + 3)
    return 1 - distance / 4 - (0.2 if values["finetune.kind"] is None else 0.0)


def test_tpe_proposes_what_lies_in_the_space(tpe, ledger):
    trials = SampledTrials(ledger, tpe(), [], 12, seed=0)
    while trials.next() is not None:
        pass
    assert len(trials.entries) == 12
    assert all(SPACE.contains(entry.values) for entry in trials.entries)


def test_tpe_learns_what_is_good(tpe, ledger):
    """Of 40 trials the last ones are better than random draws are."""
    trials = SampledTrials(ledger, tpe(), [], 40, seed=0)
    for _ in range(40):
        entry = trials.next()
        evaluated(ledger, entry.name, [quality(entry.values)])
        ledger.refresh(entry)
        ledger.close(entry, "finished")
        trials.end(entry)
    late = [entry.best.score for entry in trials.entries[-15:]]
    draws = RandomSampler(SPACE, 0, anything)
    at_random = [quality(draws.propose(n)) for n in range(200)]
    assert sum(late) / 15 > sum(at_random) / 200 + 0.1


def test_tpe_goes_on_as_it_would_have(tpe, ledger):
    """What is proposed depends on the trials that the ledger has, not on the process."""
    trials = SampledTrials(ledger, tpe(), [{"finetune.lr": 99.0}], 20, seed=0)
    for state in ("finished", "stopped", "failed", "finished", "finished", "finished"):
        ended(ledger, trials, 0.5, state)
    running = trials.next()
    again = SampledTrials(ledger, tpe(), [{"finetune.lr": 99.0}], 20, seed=0)
    assert again.next().name == running.name
    assert again.next().values == trials.next().values


def test_a_search_with_tpe_differs_by_its_seed(tpe, ledger):
    assert tpe(0).propose(1) == tpe(0).propose(1) != tpe(1).propose(1)


def test_a_wanted_trial_that_failed_is_tried_again_where_that_is_asked_for(ledger):
    wanted = [("s0", {}, 0), ("s1", {}, 1)]
    first = FixedTrials(ledger, wanted, retry=True)
    ledger.close(first.next(), "finished")
    ledger.close(first.next(), "failed", "its worker was lost")
    assert FixedTrials(ledger, wanted).next() is None
    second = FixedTrials(ledger, wanted, retry=True)
    again = second.next()
    assert (again.name, again.state, again.why, again.ended) == ("s1", "waiting", "", None)
    assert second.next() is None
    assert [(e.name, e.state) for e in ledger.entries()] == [("s0", "finished"), ("s1", "waiting")]
    with pytest.raises(RaybertError, match="member s1 failed: .* same command again .* with s1 "):
        ledger.close(again, "failed", "its worker was lost")
        check_members(second.entries)
    ledger.close(again, "finished")
    check_members(second.entries)


@pytest.mark.parametrize("retries", [False, True])
def test_what_failed_keeps_its_checkpoints_where_it_is_tried_again(ledger, retries):
    source = FixedTrials(ledger, [("s0", {}, 0), ("s1", {}, 1)])
    for state in ("finished", "failed"):
        entry = source.next()
        ledger.run(entry.name).write_text("checkpoints/step.json", "x")
        ledger.close(entry, state)
    Session(source, ledger, TrialResources(1, 1.0, 0.0), retries=retries).sweep()
    kept = [e.name for e in source.entries if ledger.run(e.name).names("checkpoints")]
    assert kept == (["s1"] if retries else [])
