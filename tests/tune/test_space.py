"""The search space: random draws, grids, conditions, and what is rejected."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.errors import ConfigError
from raybert.tune.space import Dimension, Space

SPACE = {
    "a.lr": {"log_uniform": [1e-4, 1e-1]},
    "a.share": {"uniform": [-1.0, 1.0]},
    "a.count": {"integer": [1, 4]},
    "a.size": {"log_integer": [1, 64]},
    "a.kind": {"choice": ["x", "y", None]},
    "a.only_x": {"uniform": [0, 1], "when": {"a.kind": "x"}},
    "a.deep": {"choice": [1, 2], "when": {"a.kind": ["x", "y"], "a.count": 2}},
}


def draws(count=300, space=SPACE):
    parsed = Space.parse(space)
    return parsed, [parsed.draw(random.Random(seed)) for seed in range(count)]


def test_draws_lie_in_the_space():
    space, drawn = draws()
    for values in drawn:
        assert space.contains(values)
        assert isinstance(values["a.count"], int)
    assert {values["a.count"] for values in drawn} == {1, 2, 3, 4}
    assert {values["a.kind"] for values in drawn} == {"x", "y", None}


def test_logarithmic_ranges_are_drawn_uniformly_in_the_logarithm():
    _, drawn = draws(1000)
    logs = [math.log10(values["a.lr"]) for values in drawn]
    for low in (-4, -3, -2):
        assert sum(low <= x < low + 1 for x in logs) == pytest.approx(333, abs=70)
    sizes = [values["a.size"] for values in drawn]
    assert sum(size <= 8 for size in sizes) == pytest.approx(
        500, abs=120
    )  # half of the logarithmic range
    counts = [values["a.count"] for values in drawn]
    assert [counts.count(n) for n in (1, 2, 3, 4)] == pytest.approx([250] * 4, abs=60)


def test_a_key_is_drawn_if_and_only_if_its_conditions_hold():
    _, drawn = draws()
    for values in drawn:
        assert ("a.only_x" in values) == (values["a.kind"] == "x")
        assert ("a.deep" in values) == (values["a.kind"] in ("x", "y") and values["a.count"] == 2)


def test_a_key_may_be_listed_before_the_key_of_its_condition():
    reversed_space = dict(reversed(SPACE.items()))
    assert {d.key for d in Space.parse(reversed_space).dimensions} == set(SPACE)
    for values in draws(50, reversed_space)[1]:
        assert ("a.only_x" in values) == (values["a.kind"] == "x")


def test_a_grid_has_every_combination_once():
    space = Space.parse(
        {
            "a": {"choice": [1, 2]},
            "b": {"uniform": [0, 1], "points": 3},
            "c": {"integer": [1, 2], "when": {"a": 1}},
        }
    )
    grid = space.grid()
    assert len(grid) == 3 * 2 + 3  # c is active for one of a's two values
    assert len({repr(values) for values in grid}) == len(grid)
    assert all(space.contains(values) for values in grid)
    assert {values["b"] for values in grid} == {0.0, 0.5, 1.0}


@given(fraction=st.floats(0, 1), low=st.floats(1e-6, 1), width=st.floats(1e-3, 1e3))
def test_every_fraction_of_a_range_lies_in_it(fraction, low, width):
    for kind in ("uniform", "log_uniform"):
        dimension = Dimension("k", kind, low, low + width)
        assert dimension.contains(dimension.at(fraction))
    whole = Dimension("k", "log_integer", 1, 1 + math.ceil(width))
    assert whole.contains(whole.at(fraction))


def test_clipping_moves_values_into_the_space():
    space = Space.parse(SPACE)
    values = {"a.lr": 5.0, "a.count": 9.4, "a.share": -0.5, "a.kind": "z", "seed": 3}
    assert space.clip(values) == {
        "a.lr": 1e-1, "a.count": 4, "a.share": -0.5, "a.kind": "x", "seed": 3
    }  # fmt: skip


def test_settings_give_the_values_of_the_active_keys():
    space = Space.parse(SPACE)
    settings = dict.fromkeys(SPACE, 0) | {"a.kind": "y", "a.count": 2}
    assert set(space.of(settings)) == set(SPACE) - {"a.only_x"}
    assert not space.contains(space.of(settings))  # lr=0 lies outside


def test_dotted_and_nested_keys_are_equivalent():
    """`--set tune.space.a.lr={...}` nests the keys; null removes a key."""
    nested = {"a": {"lr": {"log_uniform": [1e-4, 1e-1]}, "share": None}}
    [dimension] = Space.parse(nested).dimensions
    assert dimension == Space.parse({"a.lr": SPACE["a.lr"]}).dimensions[0]


@pytest.mark.parametrize(
    ("given_range", "words"),
    [
        (0.1, "tune.space: k: 0.1 is one value; give a range or choices"),
        ({"loguniform": [1, 2]}, "k: unknown kind loguniform; did you mean log_uniform?"),
        ({"zzz": 1}, "k: unknown kind zzz; known: uniform"),
        ({"uniform": [2, 1]}, "k: uniform=[2, 1] is empty; the first number must be less"),
        ({"uniform": [1, 1]}, "is empty"),
        ({"uniform": [1]}, "k: uniform=[1]: give two numbers"),
        ({"uniform": ["a", "b"]}, "give two numbers"),
        ({"log_uniform": [0, 1]}, "a logarithmic range needs numbers above 0"),
        ({"integer": [0.5, 2]}, "give whole numbers, or use uniform"),
        ({"choice": []}, "k: choice=[] is empty; list the values to try"),
        ({"uniform": [0, 1], "choice": [1]}, "give exactly one of"),
        ({}, "give exactly one of"),
        ({"uniform": [0, 1], "points": 0}, "points=0: give a whole number from 1 up"),
        ({"uniform": [0, 1], "when": {"other": 1}}, "its condition names other, which is not"),
        ({"uniform": [0, 1], "when": {"k": 1}}, "the conditions of k are circular"),
    ],
)
def test_an_invalid_space_is_reported_in_one_line(given_range, words):
    with pytest.raises(ConfigError) as caught:
        Space.parse({"k": given_range})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
