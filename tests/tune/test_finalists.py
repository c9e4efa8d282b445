"""Who wins, by the mean over seeds that the search did not use."""

import pytest

from raybert.errors import RaybertError
from raybert.tune.finalists import finalists_of, gathered, runs_of
from raybert.tune.importance import importance
from raybert.tune.space import Space
from raybert.tune.summary import Cost, result_of
from raybert.tune.trial_store import Evaluation, TrialRecord


def entry(name, score=None, values=None, state="finished", seed=0):
    evaluations = [] if score is None else [Evaluation(1, 1.0, score, score, 0.5, 0.0)]
    values = {"k": name} if values is None else values
    error = "why" * (not score)
    return TrialRecord(name, values, seed, state, error, evaluations=evaluations)


TRIALS = [
    entry("0000", 0.70),
    entry("0001", 0.90),
    entry("0002", 0.80),
    entry("0003", 0.95, state="failed"),
    entry("0004", 0.85, {"k": "0001"}),  # the same values as a better one
]


def test_finalists_are_the_best_of_different_values_and_the_configured_ones():
    assert [e.name for e in finalists_of(TRIALS, 2)] == ["0001", "0002", "0000"]
    assert [e.name for e in finalists_of(TRIALS, 9)] == ["0001", "0002", "0000"]
    assert [e.name for e in finalists_of(TRIALS, 1)] == ["0001", "0000"]


def test_the_configured_values_are_a_finalist_even_where_they_failed():
    trials = [entry("0000", None, state="failed"), entry("0001", 0.5)]
    assert [e.name for e in finalists_of(trials, 1)] == ["0001", "0000"]


def taken_over(name, score, before, values):
    found = entry(name, score, values)
    found.exchanges = [{"before": before}, {"before": {"k": "between"}}]
    return found


def test_the_configured_values_are_a_finalist_where_their_trial_took_over_anothers():
    trials = [taken_over("0000", 0.8, {"k": "configured"}, {"k": "mutated"}), entry("0001", 0.9)]
    finalists = finalists_of(trials, 2)
    assert [(e.name, e.values["k"]) for e in finalists] == [
        ("0001", "0001"), ("0000", "mutated"), ("configured", "configured"),
    ]  # fmt: skip
    assert ("configured-s1", {"k": "configured"}, 6) in runs_of(finalists, 5, 1)
    # It stays the winner unless another is above it by more than chance; 0000 is but a trial.
    runs = [
        *of_seeds("0001", 0.85, 0.87, 0.86), *of_seeds("0000", 0.70, 0.70, 0.70),
        *of_seeds("configured", 0.85, 0.84, 0.86),
    ]  # fmt: skip
    found = gathered(finalists, runs, 10**6)
    assert [f.trial.name for f in found] == ["configured", "0001", "0000"]
    assert [f.is_configured for f in found] == [True, False, False]
    result = result_of(trials, found, Cost(0.0, 0.0, 0.0), 1.0)
    assert result["default"]["trial"] == result["best"]["trial"] == "configured"
    assert result["default"]["config"] == {"k": "configured"}


def test_a_search_of_failures_says_why():
    with pytest.raises(RaybertError, match="no trial came to a score: why"):
        finalists_of([entry("0000", None, state="failed")], 1)


def test_seeds_are_new_ones_and_the_same_for_all():
    finalists = finalists_of(TRIALS, 1)
    assert runs_of(finalists, 5, 2) == [
        ("0001-s1", {"k": "0001"}, 6),
        ("0000-s1", {"k": "0000"}, 6),
        ("0001-s2", {"k": "0001"}, 7),
        ("0000-s2", {"k": "0000"}, 7),
    ]


def test_the_mean_over_seeds_decides_not_the_search():
    finalists = finalists_of(TRIALS, 2)
    scores = {"0001": (0.60, 0.90), "0002": (0.80, 0.82), "0000": (0.79, 0.81)}
    runs = [
        entry(f"{name}-s{number}", score, seed=number)
        for name, pair in scores.items()
        for number, score in enumerate(pair, 1)
    ]
    found = gathered(finalists, runs, 10**6)
    assert [finalist.trial.name for finalist in found] == ["0002", "0000", "0001"]
    assert found[0].best_run().name == "0002-s2"
    shown = found[0].as_json()
    assert shown["seeds"]["accuracy"]["mean"] == pytest.approx(0.81)
    assert shown["seeds"]["accuracy"]["std"] == pytest.approx(0.0141421, abs=1e-6)
    assert shown["seeds"]["n"] == 2


def of_seeds(name, *scores):
    return [entry(f"{name}-s{n}", score, seed=n) for n, score in enumerate(scores, 1)]


@pytest.mark.parametrize(
    ("challenger", "configured", "winner", "texts"),
    [
        (
            (0.85, 0.87, 0.86),
            (0.85, 0.84, 0.86),
            "0000",
            10**6,
        ),  # above by a third of a point on average
        ((0.86, 0.86, 0.87), (0.85, 0.84, 0.86), "0007", 10**6),  # above with every seed
        ((0.87, 0.99, 0.70), (0.85, 0.84, 0.86), "0000", 10**6),  # by one lucky seed
        ((0.86, 0.86, 0.87), (0.85, 0.84, 0.86), "0000", 100),  # on a hundred texts it is nothing
        ((0.87,), (0.85,), "0007", 10**6),  # nothing is known of chance
        ((0.87, 0.86), (), "0007", 10**6),
    ],
)
def test_the_configured_values_stay_unless_another_is_above_by_more_than_chance(
    challenger, configured, winner, texts
):
    runs = [*of_seeds("0007", *challenger), *of_seeds("0000", *configured)]
    found = gathered([entry("0007", 0.9), entry("0000", 0.5)], runs, texts)
    assert [finalist.trial.name for finalist in found][0] == winner
    assert {finalist.trial.name for finalist in found} == {"0000", "0007"}


def test_of_equals_the_configured_values_win():
    finalists = [entry("0007", 0.9), entry("0000", 0.5)]
    runs = [entry("0007-s1", 0.8), entry("0000-s1", 0.8)]
    assert gathered(finalists, runs, 10**6)[0].trial.name == "0000"


def test_a_run_that_failed_is_told_and_does_not_count():
    finalists = [entry("0001", 0.9), entry("0000", 0.5)]
    runs = [entry("0001-s1", None, state="failed"), entry("0001-s2", 0.9), entry("0000-s1", 0.8)]
    best = gathered(finalists, runs, 10**6)[0].as_json()
    assert (best["trial"], best["seeds"]["n"], best["seeds"]["failed"]) == ("0001", 1, ["why"])
    assert best["seeds"]["accuracy"]["std"] is None
    with pytest.raises(RaybertError, match="no finalist came to a score: why"):
        gathered(finalists, [entry("0001-s1", None, state="failed")], 100)


# Importance --------------------------------------------------------------------------------------

SPACE = Space.parse(
    {
        "a.decides": {"uniform": [0, 1]},
        "a.noise": {"uniform": [0, 1]},
        "a.kind": {"choice": ["x", "y"]},
        "a.constant": {"choice": ["x", "y"]},
    }
)


def test_what_decides_is_important_and_what_does_not_is_not():
    import random

    draws = random.Random(0)
    entries = []
    for number in range(60):
        values = SPACE.draw(draws) | {"a.constant": "x"}
        score = values["a.decides"] ** 3 + (0.1 if values["a.kind"] == "x" else 0.0)
        entries.append(entry(f"{number:04d}", score + 1e-3, values))
    found = importance(SPACE, entries)
    assert found["a.decides"] > 0.9
    assert found["a.noise"] < 0.15
    assert found["a.noise"] < found["a.decides"]
    assert 0 <= found["a.kind"] < 0.3
    assert found["a.constant"] is None


def test_a_choice_that_decides_alone_explains_all():
    entries = [entry(f"{n:04d}", 0.5 + 0.25 * (n % 2), {"a.kind": "xy"[n % 2]}) for n in range(20)]
    assert importance(SPACE, entries)["a.kind"] == 1.0


def test_too_few_trials_tell_nothing():
    entries = [entry(f"{n:04d}", 0.5, {"a.decides": n / 3}) for n in range(3)]
    assert set(importance(SPACE, entries).values()) == {None}
