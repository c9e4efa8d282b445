"""Learning-rate schedules: their exact values, and the bounds that all of them keep."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.train.schedules import SCHEDULES, schedule_at
from raybert.train.settings import TrainConfig


def config(**values):
    return TrainConfig(steps=100, **values)


# A run of 100 steps of which 10 warm up: what the learning rate is multiplied by.
@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("linear", 0, 1 / 11),
        ("linear", 4, 5 / 11),
        ("linear", 9, 10 / 11),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 99, 1 / 90),
        ("linear", 100, 0.0),
        ("cosine", 9, 10 / 11),
        ("cosine", 10, 1.0),
        ("cosine", 40, 0.75),
        ("cosine", 55, 0.5),
        ("cosine", 70, 0.25),
        ("cosine", 100, 0.0),
        ("constant", 3, 4 / 11),
        ("constant", 10, 1.0),
        ("constant", 99, 1.0),
        ("stable-decay", 9, 10 / 11),
        ("stable-decay", 50, 1.0),
        ("stable-decay", 80, 1.0),
        ("stable-decay", 85, 0.75),
        ("stable-decay", 95, 0.25),
        ("stable-decay", 100, 0.0),
    ],
)
def test_the_learning_rate_at_a_step(schedule, step, share):
    got = schedule_at(step, 100, 10, config(schedule=schedule, decay_fraction=0.2))
    assert got == pytest.approx(share, abs=1e-12)


@given(
    schedule=st.sampled_from(list(SCHEDULES)),
    total=st.integers(1, 10_000),
    data=st.data(),
)
def test_the_learning_rate_stays_between_zero_and_its_peak(schedule, total, data):
    warmup = data.draw(st.integers(0, total))
    step = data.draw(st.integers(0, total + 5))
    share = schedule_at(step, total, warmup, config(schedule=schedule))
    assert 0 <= share <= 1
    assert math.isfinite(share)
    if step < warmup:
        assert share < schedule_at(step + 1, total, warmup, config(schedule="constant"))
