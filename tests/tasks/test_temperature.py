"""Calibration by one number: what it must not move, and what it must find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.tasks.classification_metrics import classification_scores
from raybert.tasks.temperature import RANGE, fit_temperature

NAMES = ["a", "b", "c"]


def drawn(seed, n=4000):
    """Labels that are drawn by the very probabilities of some logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits, (shares.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_logits_were_sharpened_by_is_found(temperature):
    logits, labels = drawn(0)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("sharpened", [0.4, 3.0])
def test_it_lowers_the_loss_and_the_calibration_error(sharpened):
    logits, labels = drawn(1)
    logits = logits * sharpened
    before = classification_scores(logits, labels, NAMES)
    after = classification_scores(logits / fit_temperature(logits, labels), labels, NAMES)
    assert after["loss"] < before["loss"]
    assert after["expected_calibration_error"] < before["expected_calibration_error"] / 2
    assert after["accuracy"] == before["accuracy"]


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=n, max_size=n),
            st.lists(st.integers(0, 2), min_size=n, max_size=n),
        )
    )
)
@settings(deadline=None)
def test_any_logits_give_a_temperature_within_its_range(rows):
    logits, labels = rows
    assert RANGE[0] <= fit_temperature(logits, labels) <= RANGE[1]


def test_a_model_without_a_mistake_is_not_taken_for_one_that_never_errs():
    few, many = 4, 4000
    sure = np.array([[4.0, -4.0], [-4.0, 4.0]])
    temperatures = [
        fit_temperature(np.tile(sure, (n // 2, 1)), np.tile([0, 1], n // 2)) for n in (few, many)
    ]
    assert temperatures[0] > 1  # four right answers say little
    assert temperatures[1] < temperatures[0]


def test_no_rows_leave_the_logits_as_they_are():
    assert fit_temperature(np.empty((0, 2)), np.empty(0, np.int64)) == 1.0
