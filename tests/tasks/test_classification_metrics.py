import json
import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.errors import DataError, RaybertError
from raybert.records import finite
from raybert.tasks.classification_metrics import NUM_BINS, calibration, classification_scores


def logits_of(probabilities):
    return np.log(np.asarray(probabilities))


def test_metrics_of_a_small_case_computed_by_hand():
    scores = classification_scores(
        logits_of([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]]), [0, 1, 1, 1], ["neg", "pos"]
    )
    assert scores["n"] == 4
    assert scores["accuracy"] == 0.75
    assert scores["loss"] == pytest.approx(-(math.log(0.9 * 0.4 * 0.7 * 0.8)) / 4)
    assert scores["confusion"] == [[1, 0], [1, 2]]
    neg, pos = scores["per_class"]["neg"], scores["per_class"]["pos"]
    assert (neg["precision"], neg["recall"], neg["support"]) == (0.5, 1.0, 1)
    assert (pos["precision"], pos["recall"], pos["support"]) == (1.0, pytest.approx(2 / 3), 3)
    assert neg["f1"] == pytest.approx(2 / 3)
    assert pos["f1"] == pytest.approx(0.8)
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 0.8) / 2)
    # Four rows in four bins; each is off by |correct - confidence|: 0.1, 0.6, 0.3, 0.2.
    assert scores["expected_calibration_error"] == pytest.approx(1.2 / 4)


def test_calibration_averages_within_bins_before_comparing():
    # Four rows of confidence 0.7, of which three are right: off by 0.05, not by the mean of
    # |correct - confidence|.
    error, bins = calibration(np.full(4, 0.7), np.array([True, True, True, False]))
    assert error == pytest.approx(0.05)
    filled = [b for b in bins if b["count"]]
    assert len(filled) == 1
    assert filled[0]["accuracy"] == 0.75
    assert filled[0]["confidence"] == pytest.approx(0.7)
    assert all(b["accuracy"] is None and b["confidence"] is None for b in bins if not b["count"])


@pytest.mark.parametrize(("confidence", "index"), [(1.0, 14), (0.2, 2), (0.2 + 1e-9, 3), (1e-9, 0)])
def test_bins_are_open_below_and_closed_above(confidence, index):
    _, bins = calibration(np.array([confidence]), np.array([True]))
    assert [b["count"] for b in bins].index(1) == index


def test_a_label_that_never_occurs_counts_in_f1_macro_only_when_predicted():
    names = ["a", "b", "never"]
    ignored = classification_scores([[2.0, 0, 0], [0, 2.0, 0]], [0, 1], names)
    assert ignored["f1_macro"] == 1.0
    never = {"precision": None, "recall": None, "f1": None, "support": 0}
    assert finite(ignored["per_class"]["never"]) == never
    predicted = classification_scores([[2.0, 0, 0], [0, 0, 2.0]], [0, 1], names)
    assert predicted["f1_macro"] == pytest.approx(1 / 3)


def test_five_hundred_labels_are_scored():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 500, 2000)
    scores = classification_scores(
        np.eye(500)[labels] * 5, labels, [f"class {i}" for i in range(500)]
    )
    assert scores["accuracy"] == scores["f1_macro"] == 1.0
    assert len(scores["per_class"]) == 500


def test_large_logits_do_not_overflow():
    scores = classification_scores([[1e4, -1e4], [1e4, -1e4]], [0, 1], ["a", "b"])
    assert scores["loss"] == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("logits", "labels", "names", "kind", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), ["a", "b"], DataError, "no rows to score"),
        ([[0.0, 1.0]], [2], ["a", "b"], DataError, "row 0 has label 2.*knows 2 labels"),
        ([[0.0, 1.0]], [-100], ["a", "b"], DataError, "row 0 has label -100"),
        ([[0.0, 1.0]], [0], ["a"], ValueError, "do not fit 1 label names"),
        ([[0.0, 1.0]], [0, 1], ["a", "b"], ValueError, "labels of shape"),
        ([[0.0, 1.0]], [0.0], ["a", "b"], ValueError, "must be integers"),
        ([[0.0, 1.0]], [0], ["a", "a"], ValueError, "differ"),
        ([[0.0, 1.0], [0.0, np.nan]], [0, 1], ["a", "b"], RaybertError, "row 1 .* lower lr"),
    ],
)
def test_invalid_inputs_are_rejected(logits, labels, names, kind, message):
    with pytest.raises(kind, match=message):
        classification_scores(logits, labels, names)


@st.composite
def predictions(draw):
    n, num_labels = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    logits = draw(hnp.arrays(np.float32, (n, num_labels), elements=st.floats(-30, 30, width=32)))
    labels = draw(hnp.arrays(np.int64, n, elements=st.integers(0, num_labels - 1)))
    return logits, labels, [str(i) for i in range(num_labels)]


@given(predictions())
@settings(deadline=None, max_examples=60)
def test_metrics_are_consistent_for_any_predictions(case):
    logits, labels, names = case
    scores = classification_scores(logits, labels, names)
    n = len(labels)
    confusion = np.array(scores["confusion"])
    assert json.loads(json.dumps(finite(scores), allow_nan=False)) == finite(scores)
    assert confusion.sum() == scores["n"] == n
    assert scores["accuracy"] == pytest.approx(confusion.trace() / n)
    assert confusion.sum(axis=1).tolist() == [scores["per_class"][m]["support"] for m in names]
    assert scores["loss"] >= 0
    assert 0 <= scores["expected_calibration_error"] <= 1
    assert len(scores["bins"]) == NUM_BINS
    assert sum(b["count"] for b in scores["bins"]) == n
    for b in scores["bins"]:
        if b["count"]:
            assert b["lower"] - 1e-9 <= b["confidence"] <= b["upper"] + 1e-9
    # The order of the rows does not matter.
    shuffled = np.random.default_rng(0).permutation(n)
    again = classification_scores(logits[shuffled], labels[shuffled], names)
    assert again["confusion"] == scores["confusion"]
    assert again["loss"] == pytest.approx(scores["loss"])
