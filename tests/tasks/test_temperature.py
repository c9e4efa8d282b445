"""Temperature scaling finds the temperature and lowers the loss and the calibration error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.tasks.classification_metrics import RANGE, classification_scores, fit_temperature

NAMES = ["a", "b", "c"]


def draw(seed, n=4000):
    """Random logits, and labels drawn from their probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits, (probabilities.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_scaled_logits_is_found(temperature):
    logits, labels = draw(0)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_scaling_lowers_loss_and_calibration_error_and_keeps_accuracy(factor):
    logits, labels = draw(1)
    logits = logits * factor
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
def test_the_temperature_is_within_its_range_for_any_logits(rows):
    logits, labels = rows
    assert RANGE[0] <= fit_temperature(logits, labels) <= RANGE[1]


def test_few_rows_without_a_mistake_do_not_make_predictions_more_confident():
    few, many = 4, 4000
    sure = np.array([[4.0, -4.0], [-4.0, 4.0]])
    temperatures = [
        fit_temperature(np.tile(sure, (n // 2, 1)), np.tile([0, 1], n // 2)) for n in (few, many)
    ]
    assert temperatures[0] > 1  # four right answers are little evidence
    assert temperatures[1] < temperatures[0]


def test_without_rows_the_temperature_is_one():
    assert fit_temperature(np.empty((0, 2)), np.empty(0, np.int64)) == 1.0
