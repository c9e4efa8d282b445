"""Likely label errors: found where they were made, and as in the paper."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raybert.tasks.label_errors import likely_errors
from raybert.tasks.single_label import SingleLabel


def test_labels_that_were_swapped_are_found():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 300)
    probabilities = np.full((300, 3), 0.1)
    probabilities[np.arange(300), truth] = 0.8
    labels = truth.copy()
    swapped = draw.choice(300, 15, replace=False)
    labels[swapped] = (truth[swapped] + 1) % 3
    found = likely_errors(probabilities, labels)
    assert {error.row for error in found} == set(swapped.tolist())
    assert all(error.suggested == truth[error.row] for error in found)


def test_the_example_of_the_paper():
    """Thresholds are 0.7 and 0.6: the third text reaches the other class's, the fourth does not."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.55, 0.45], [0.25, 0.75]])
    labels = np.array([0, 0, 0, 1, 1])
    assert [(e.row, e.suggested) for e in likely_errors(probabilities, labels)] == [(2, 1)]


@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_every_error_reaches_the_threshold_of_another_class(rows, classes, seed):
    draw = np.random.default_rng(seed)
    probabilities = draw.dirichlet(np.ones(classes), rows)
    labels = draw.integers(0, classes, rows)
    found = likely_errors(probabilities, labels)
    for error in found:
        assert error.suggested != labels[error.row]
        same = probabilities[labels == error.suggested, error.suggested]
        assert len(same) and error.probability >= same.mean() - 1e-9
    assert [error.of_label for error in found] == sorted(error.of_label for error in found)


def test_a_task_names_the_labels():
    outputs = np.array([[4, 0], [4, 0], [0, 4], [0, 4], [0, 4]], np.float32)
    [(row, shown)] = SingleLabel(["no", "yes"]).label_errors(outputs, np.array([0, 0, 0, 1, 1]))
    assert row == 2 and (shown["label"], shown["suggested"]) == ("no", "yes")
