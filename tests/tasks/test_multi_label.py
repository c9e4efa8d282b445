"""Multi-label classification: labels read, thresholds fitted, metrics, answers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from raybert.data.sources.settings import SourceConfig
from raybert.tasks.multi_label import MultiLabel, best_threshold
from raybert.tasks.protocol import AnswerOptions

TASK = MultiLabel(["a", "b", "c"])


def parse(value, **settings):
    _, label, problem = MultiLabel.parser(SourceConfig(**settings))("a text", value)
    assert (label is None) != (problem is None)
    return json.loads(label) if problem is None else problem


@pytest.mark.parametrize(
    ("value", "settings", "expected"),
    [
        (["a", "b"], {}, ["a", "b"]),
        (["b", "b", " a "], {}, ["b", "a"]),
        ([], {}, []),
        ("a|c", {"label_separator": "|"}, ["a", "c"]),
        ("", {"label_separator": "|"}, []),
        (b"a, b", {"label_separator": ","}, ["a", "b"]),
        ({"a": 1, "b": "0", "c": True}, {}, ["a", "c"]),
        ({"a": 1.0, "b": b"1", "c": ""}, {}, ["a", "b"]),
        ([0, 2], {"labels": ["a", "b", "c"]}, ["a", "c"]),
        (None, {}, "no label"),
        (float("nan"), {}, "no label"),
        ({"a": 1, "b": None}, {}, "label is neither 0 nor 1 (b=None)"),
        ({"a": 2}, {}, "label is neither 0 nor 1 (a=2)"),
        (["x"], {"labels": ["a", "b"]}, "label 'x' is not one of labels=['a', 'b']"),
    ],
)
def test_labels_are_read(value, settings, expected):
    assert parse(value, **settings) == expected


def test_targets_are_zeros_and_ones():
    assert TASK.targets(['["c", "a"]', "[]"]).tolist() == [[1, 0, 1], [0, 0, 0]]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=8, max_size=40).filter(
        lambda rows: 3 <= sum(is_true for _, is_true in rows) <= len(rows) - 3
    )
)
def test_the_threshold_has_the_highest_f1(rows):
    probabilities = np.array([p for p, _ in rows], np.float32)
    truth = np.array([is_true for _, is_true in rows])

    def f1(threshold):
        chosen = probabilities.astype(np.float64) >= threshold
        return 2 * (chosen & truth).sum() / max(1, chosen.sum() + truth.sum())

    threshold = best_threshold(probabilities, truth)
    assert f1(threshold) >= max(f1(float(p)) for p in probabilities) - 1e-9


def test_too_few_positives_keep_the_default_threshold():
    assert best_threshold(np.array([0.1, 0.2, 0.3], np.float32), np.array([1, 1, 0], bool)) == 0.5


def test_metrics_equal_scikit_learns():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 3)).astype(np.float32)
    targets = (rng.random((200, 3)) < 0.3).astype(np.float32)
    scores = TASK.evaluate(logits, targets)
    predicted = 1 / (1 + np.exp(-logits)) >= 0.5
    assert scores["f1_micro"] == pytest.approx(f1_score(targets, predicted, average="micro"))
    assert scores["f1_macro"] == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert scores["accuracy"] == (targets == predicted).all(axis=1).mean()
    json.dumps(scores)


def test_the_loss_ignores_unknown_targets_and_sums_over_texts():
    config = SimpleNamespace(class_weights=None, focal_gamma=0.0, label_smoothing=0.0)
    loss = TASK.make_loss(config, np.zeros((1, 3)))
    logits = torch.randn(4, 3)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [float("nan")] * 3])
    parts = [loss(logits[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert loss(logits, targets).item() == pytest.approx(sum(parts).item(), rel=1e-6)
    assert parts[3].item() == 0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:3], targets[:3])
    assert loss(logits, targets).item() == pytest.approx(3 * expected.item(), rel=1e-5)


def test_divergence_is_zero_only_between_equal_predictions():
    x = torch.randn(5, 3)
    assert TASK.divergence(x, x).abs().max() < 1e-6
    assert (TASK.divergence(x, x + 1) > 0).all()


def test_none_of_the_labels_is_an_answer():
    logits = np.array([[-3.0, -2.0, -4.0], [3.0, -1.0, 0.5]], np.float32)
    nothing, two = TASK.answers(logits, None, AnswerOptions(all_scores=False))
    assert nothing == []
    assert [each["label"] for each in two] == ["a", "c"]
    every = TASK.answers(logits, None, AnswerOptions())
    assert [len(answer) for answer in every] == [3, 3]
    assert [each["label"] for each in every[0]] == ["b", "a", "c"]
    assert not any(each["selected"] for each in every[0])
    assert TASK.columns(every)[1]["labels"] == ["a", "c"]
    assert len(TASK.answers(logits, None, AnswerOptions(top_k=1))[1]) == 1
    assert [len(a) for a in TASK.answers(logits, None, AnswerOptions(threshold=0.6))] == [0, 2]


def test_fitted_thresholds_decide():
    fitted = MultiLabel(["a", "b", "c"], {"thresholds": {"a": 0.9, "b": 0.05, "c": 0.5}})
    [answer] = fitted.answers(np.array([[2.0, -2.0, 0.1]], np.float32), None, AnswerOptions())
    assert {each["label"]: each["selected"] for each in answer} == {
        "a": False,
        "b": True,
        "c": True,
    }
