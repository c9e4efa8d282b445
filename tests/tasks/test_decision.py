"""Whether n-grams are kept: by the loss of few texts, by the metric of many."""

import numpy as np
import pytest

from raybert.tasks.comparison import text_losses
from raybert.tasks.linear.decision import FEW_TEXTS, deciding_metric, try_part
from raybert.tasks.linear.fitting import Weights
from raybert.tasks.linear.model import NgramModel
from raybert.tasks.linear.ngrams import Ngrams
from raybert.tasks.linear.pseudo_labels import sure_rows
from raybert.tasks.multi_label import MultiLabel
from raybert.tasks.regression import Regression
from raybert.tasks.single_label import SingleLabel

MODEL = NgramModel(("tf-idf",), Ngrams({"a": 0}), None, Weights(np.zeros((1, 2)), np.zeros(2)))


def outputs_of(targets, strength, seed):
    """Logits of two classes that know the targets so well."""
    noise = np.random.default_rng(seed).normal(size=len(targets))
    signal = strength * (2 * targets - 1) + noise
    return np.stack([-signal, signal], axis=1).astype(np.float32)


def tried(count, linear_strength):
    targets = np.random.default_rng(0).integers(0, 2, count)
    task = SingleLabel(["neg", "pos"])
    encoder, linear = outputs_of(targets, 1.0, 1), outputs_of(targets, linear_strength, 2)
    fitted = task.fit(encoder, targets)
    temperature = fitted.fitted["temperature"]
    return try_part(task, MODEL, task, encoder / temperature, linear, targets)


def test_the_loss_of_each_text_adds_up_to_that_of_all():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20, 3)).astype(np.float32)
    single, multi = SingleLabel(["a", "b", "c"]), MultiLabel(["a", "b", "c"])
    classes = draw.integers(0, 3, 20)
    decisions = draw.integers(0, 2, (20, 3)).astype(np.float32)
    for task, targets in ((single, classes), (multi, decisions)):
        expected = task.validate(logits, targets)["loss"]
        assert text_losses(task, logits, targets).mean() == pytest.approx(expected, rel=1e-5)
    assert text_losses(Regression(["x"]), logits[:, :1], logits[:, :1]) is None


def test_few_texts_are_judged_by_their_loss():
    for task in (SingleLabel(["a", "b"]), MultiLabel(["a", "b"]), Regression(["x"])):
        assert deciding_metric(task, FEW_TEXTS - 1) == "loss"
        assert deciding_metric(task, FEW_TEXTS) == task.default_metric
    found = tried(200, 1.0)
    assert found.metric == "loss"
    assert found.difference.low > 0  # the accuracies of 200 texts would not tell
    assert found.values[0] < min(found.values[1:])


@pytest.mark.parametrize("count", [12, 60, 200])
def test_what_knows_nothing_is_not_kept(count):
    assert tried(count, 0.0).difference.low <= 0


def test_the_surest_half_of_each_class_is_learned_from():
    outputs = np.array([[0, 5], [0, 1], [3, 0], [9, 0], [0, 2], [0, 4]], np.float32)
    assert sure_rows(SingleLabel(["a", "b"]), outputs).tolist() == [0, 3, 5]
    assert sure_rows(MultiLabel(["a", "b"]), outputs - 0.5).size == 3
    assert sure_rows(Regression(["x", "y"]), outputs).size == 6
    assert sure_rows(SingleLabel(["a", "b"]), outputs[:0]).size == 0
