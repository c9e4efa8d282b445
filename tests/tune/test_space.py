"""The search space: what is drawn from it, its grid, its conditions, and what it refuses."""

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


def test_what_is_drawn_lies_in_the_space():
    space, drawn = draws()
    for values in drawn:
        assert space.contains(values)
        assert isinstance(values["a.count"], int)
    assert {values["a.count"] for values in drawn} == {1, 2, 3, 4}
    assert {values["a.kind"] for values in drawn} == {"x", "y", None}


def test_magnitudes_are_drawn_evenly():
    _, drawn = draws(1000)
    logs = [math.log10(values["a.lr"]) for values in drawn]
    for low in (-4, -3, -2):
        assert sum(low <= x < low + 1 for x in logs) == pytest.approx(333, abs=70)
    sizes = [values["a.size"] for values in drawn]
    assert sum(size <= 8 for size in sizes) == pytest.approx(500, abs=120)  # half the magnitudes
    counts = [values["a.count"] for values in drawn]
    assert [counts.count(n) for n in (1, 2, 3, 4)] == pytest.approx([250] * 4, abs=60)


def test_a_key_appears_where_its_condition_holds_and_only_there():
    _, drawn = draws()
    for values in drawn:
        assert ("a.only_x" in values) == (values["a.kind"] == "x")
        assert ("a.deep" in values) == (values["a.kind"] in ("x", "y") and values["a.count"] == 2)


def test_conditions_may_stand_before_what_they_name():
    turned = dict(reversed(SPACE.items()))
    assert {d.key for d in Space.parse(turned).dimensions} == set(SPACE)
    for values in draws(50, turned)[1]:
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
    assert len(grid) == 3 * 2 + 3  # c matters for one of a's two values
    assert len({repr(values) for values in grid}) == len(grid)
    assert all(space.contains(values) for values in grid)
    assert {values["b"] for values in grid} == {0.0, 0.5, 1.0}


@given(share=st.floats(0, 1), low=st.floats(1e-6, 1), width=st.floats(1e-3, 1e3))
def test_any_share_of_a_range_lies_in_it(share, low, width):
    for kind in ("uniform", "log_uniform"):
        dimension = Dimension("k", kind, low, low + width)
        assert dimension.contains(dimension.at(share))
    whole = Dimension("k", "log_integer", 1, 1 + math.ceil(width))
    assert whole.contains(whole.at(share))


def test_clipping_brings_values_back():
    space = Space.parse(SPACE)
    values = {"a.lr": 5.0, "a.count": 9.4, "a.share": -0.5, "a.kind": "z", "seed": 3}
    assert space.clip(values) == {
        "a.lr": 1e-1, "a.count": 4, "a.share": -0.5, "a.kind": "x", "seed": 3
    }  # fmt: skip


def test_configured_values_are_read_off_with_their_conditions():
    space = Space.parse(SPACE)
    settings = dict.fromkeys(SPACE, 0) | {"a.kind": "y", "a.count": 2}
    assert set(space.of(settings)) == set(SPACE) - {"a.only_x"}
    assert not space.contains(space.of(settings))  # lr=0 lies outside


def test_dots_and_nesting_mean_the_same():
    """`--set tune.space.a.lr={...}` nests by its dots; null takes a key out."""
    nested = {"a": {"lr": {"log_uniform": [1e-4, 1e-1]}, "share": None}}
    [dimension] = Space.parse(nested).dimensions
    assert dimension == Space.parse({"a.lr": SPACE["a.lr"]}).dimensions[0]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (0.1, "tune.space: k: 0.1 is one value; give a range or choices"),
        ({"loguniform": [1, 2]}, "k: unknown kind loguniform; did you mean log_uniform?"),
        ({"zzz": 1}, "k: unknown kind zzz; known: uniform"),
        ({"uniform": [2, 1]}, "k: uniform=[2, 1] is empty; the first number must be less"),
        ({"uniform": [1, 1]}, "is empty"),
        ({"uniform": [1]}, "k: uniform=[1]: give two numbers"),
        ({"uniform": ["a", "b"]}, "give two numbers"),
        ({"log_uniform": [0, 1]}, "magnitudes need numbers above 0"),
        ({"integer": [0.5, 2]}, "give whole numbers, or use uniform"),
        ({"choice": []}, "k: choice=[] is empty; list the values to try"),
        ({"uniform": [0, 1], "choice": [1]}, "give exactly one of"),
        ({}, "give exactly one of"),
        ({"uniform": [0, 1], "points": 0}, "points=0: give a whole number from 1 up"),
        ({"uniform": [0, 1], "when": {"other": 1}}, "its condition names other, which is not"),
        ({"uniform": [0, 1], "when": {"k": 1}}, "the conditions of k wait for each other"),
    ],
)
def test_what_can_not_be_searched_is_told_in_a_line(said, words):
    with pytest.raises(ConfigError) as caught:
        Space.parse({"k": said})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
