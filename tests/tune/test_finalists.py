"""The winner has the best mean over seeds that the search did not use."""

import pytest

from raybert.errors import RaybertError
from raybert.pipeline.tune_result import Cost, search_result
from raybert.tune.finalists import choose_finalists, finalist_runs, rank_finalists
from raybert.tune.importance import importance
from raybert.tune.space import Space
from raybert.tune.trial_store import Evaluation, TrialRecord


def trial(name, score=None, values=None, state="finished", seed=0):
    evaluations = [] if score is None else [Evaluation(1, 1.0, score, score, 0.5, 0.0)]
    values = {"k": name} if values is None else values
    reason = "why" * (not score)
    return TrialRecord(name, values, seed, state, reason, evaluations=evaluations)


TRIALS = [
    trial("0000", 0.70),
    trial("0001", 0.90),
    trial("0002", 0.80),
    trial("0003", 0.95, state="failed"),
    trial("0004", 0.85, {"k": "0001"}),  # the same values as a better one
]


def test_finalists_are_the_best_of_different_values_and_the_configured_ones():
    assert [e.name for e in choose_finalists(TRIALS, 2)] == ["0001", "0002", "0000"]
    assert [e.name for e in choose_finalists(TRIALS, 9)] == ["0001", "0002", "0000"]
    assert [e.name for e in choose_finalists(TRIALS, 1)] == ["0001", "0000"]


def test_the_configured_values_are_a_finalist_even_if_they_failed():
    trials = [trial("0000", None, state="failed"), trial("0001", 0.5)]
    assert [e.name for e in choose_finalists(trials, 1)] == ["0001", "0000"]


def exploited(name, score, before, values):
    found = trial(name, score, values)
    found.exploits = [{"before": before}, {"before": {"k": "between"}}]
    return found


def test_the_configured_values_are_a_finalist_after_their_trial_has_exploited_another():
    trials = [exploited("0000", 0.8, {"k": "configured"}, {"k": "mutated"}), trial("0001", 0.9)]
    finalists = choose_finalists(trials, 2)
    assert [(e.name, e.values["k"]) for e in finalists] == [
        ("0001", "0001"), ("0000", "mutated"), ("configured", "configured"),
    ]  # fmt: skip
    assert ("configured-s1", {"k": "configured"}, 6) in finalist_runs(finalists, 5, 1)
    # They win unless another is better by more than a standard error, which 0000 is not.
    runs = [
        *runs_of("0001", 0.85, 0.87, 0.86), *runs_of("0000", 0.70, 0.70, 0.70),
        *runs_of("configured", 0.85, 0.84, 0.86),
    ]  # fmt: skip
    found = rank_finalists(finalists, runs, 10**6)
    assert [f.trial.name for f in found] == ["configured", "0001", "0000"]
    assert [f.is_configured for f in found] == [True, False, False]
    result = search_result(trials, found, Cost(0.0, 0.0, 0.0), 1.0)
    assert result["default"]["trial"] == result["best"]["trial"] == "configured"
    assert result["default"]["config"] == {"k": "configured"}


def test_if_all_trials_fail_the_error_gives_the_reason():
    with pytest.raises(RaybertError, match="no trial has a score: why"):
        choose_finalists([trial("0000", None, state="failed")], 1)


def test_finalists_run_with_the_same_new_seeds():
    finalists = choose_finalists(TRIALS, 1)
    assert finalist_runs(finalists, 5, 2) == [
        ("0001-s1", {"k": "0001"}, 6),
        ("0000-s1", {"k": "0000"}, 6),
        ("0001-s2", {"k": "0001"}, 7),
        ("0000-s2", {"k": "0000"}, 7),
    ]


def test_the_mean_over_seeds_decides_not_the_score_of_the_search():
    finalists = choose_finalists(TRIALS, 2)
    scores = {"0001": (0.60, 0.90), "0002": (0.80, 0.82), "0000": (0.79, 0.81)}
    runs = [
        trial(f"{name}-s{number}", score, seed=number)
        for name, pair in scores.items()
        for number, score in enumerate(pair, 1)
    ]
    found = rank_finalists(finalists, runs, 10**6)
    assert [finalist.trial.name for finalist in found] == ["0002", "0000", "0001"]
    assert found[0].best_run().name == "0002-s2"
    shown = found[0].as_json("accuracy")
    assert shown["seeds"]["accuracy"]["mean"] == pytest.approx(0.81)
    assert shown["seeds"]["accuracy"]["std"] == pytest.approx(0.0141421, abs=1e-6)
    assert shown["seeds"]["n"] == 2


def runs_of(name, *scores):
    return [trial(f"{name}-s{n}", score, seed=n) for n, score in enumerate(scores, 1)]


@pytest.mark.parametrize(
    ("challenger", "configured", "winner", "texts"),
    [
        # Better by a hundredth on average, all of it with one seed.
        ((0.85, 0.87, 0.86), (0.85, 0.84, 0.86), "0000", 10**6),
        ((0.86, 0.86, 0.87), (0.85, 0.84, 0.86), "0007", 10**6),  # better with every seed
        ((0.87, 0.99, 0.70), (0.85, 0.84, 0.86), "0000", 10**6),  # one lucky seed
        ((0.86, 0.86, 0.87), (0.85, 0.84, 0.86), "0000", 100),  # too few validation texts
        ((0.87,), (0.85,), "0007", 10**6),  # one seed has no variance
        ((0.87, 0.86), (), "0007", 10**6),
    ],
)
def test_the_configured_values_win_unless_another_is_better_by_more_than_a_standard_error(
    challenger, configured, winner, texts
):
    runs = [*runs_of("0007", *challenger), *runs_of("0000", *configured)]
    found = rank_finalists([trial("0007", 0.9), trial("0000", 0.5)], runs, texts)
    assert [finalist.trial.name for finalist in found][0] == winner
    assert {finalist.trial.name for finalist in found} == {"0000", "0007"}


def test_of_equal_means_the_configured_values_win():
    finalists = [trial("0007", 0.9), trial("0000", 0.5)]
    runs = [trial("0007-s1", 0.8), trial("0000-s1", 0.8)]
    assert rank_finalists(finalists, runs, 10**6)[0].trial.name == "0000"


def test_a_failed_run_is_reported_and_does_not_count():
    finalists = [trial("0001", 0.9), trial("0000", 0.5)]
    runs = [trial("0001-s1", None, state="failed"), trial("0001-s2", 0.9), trial("0000-s1", 0.8)]
    best = rank_finalists(finalists, runs, 10**6)[0].as_json("accuracy")
    assert (best["trial"], best["seeds"]["n"], best["seeds"]["failed"]) == ("0001", 1, ["why"])
    assert best["seeds"]["accuracy"]["std"] is None
    with pytest.raises(RaybertError, match="no finalist has a score: why"):
        rank_finalists(finalists, [trial("0001-s1", None, state="failed")], 100)


# Importance --------------------------------------------------------------------------------------

SPACE = Space.parse(
    {
        "a.decides": {"uniform": [0, 1]},
        "a.noise": {"uniform": [0, 1]},
        "a.kind": {"choice": ["x", "y"]},
        "a.constant": {"choice": ["x", "y"]},
    }
)


def test_a_key_that_decides_the_score_is_important_and_noise_is_not():
    import random

    draws = random.Random(0)
    trials = []
    for number in range(60):
        values = SPACE.draw(draws) | {"a.constant": "x"}
        score = values["a.decides"] ** 3 + (0.1 if values["a.kind"] == "x" else 0.0)
        trials.append(trial(f"{number:04d}", score + 1e-3, values))
    found = importance(SPACE, trials)
    assert found["a.decides"] > 0.9
    assert found["a.noise"] < 0.15
    assert found["a.noise"] < found["a.decides"]
    assert 0 <= found["a.kind"] < 0.3
    assert found["a.constant"] is None


def test_a_choice_that_decides_the_score_alone_explains_all_of_it():
    trials = [trial(f"{n:04d}", 0.5 + 0.25 * (n % 2), {"a.kind": "xy"[n % 2]}) for n in range(20)]
    assert importance(SPACE, trials)["a.kind"] == 1.0


def test_too_few_trials_have_no_importance():
    trials = [trial(f"{n:04d}", 0.5, {"a.decides": n / 3}) for n in range(3)]
    assert set(importance(SPACE, trials).values()) == {None}
