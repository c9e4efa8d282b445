"""The linear model as a teacher: no text is taught by a model that was fitted on its label."""

import numpy as np
import pyarrow as pa
import pytest

from raybert.tasks.labelled import Labelled
from raybert.tasks.linear.teacher import LinearTeacher
from raybert.tasks.registry import TASKS


def labelled(texts, labels):
    return Labelled(pa.chunked_array([texts]), pa.chunked_array([labels]), None, None, {})


@pytest.fixture(scope="module")
def task():
    return TASKS["single_label"](["bad", "good"])


def test_a_text_s_own_label_does_not_decide_what_is_taught(task):
    # Each text has a word of its own, by which a model that saw its label would know it.
    random = np.random.default_rng(0)
    labels = [["bad", "good"][i] for i in random.integers(0, 2, 200)]
    texts = [f"word{i} film number{i}" for i in range(200)]
    taught = LinearTeacher(0).logits(labelled(texts, labels), task)
    right = taught.argmax(1) == [label == "good" for label in labels]
    assert 0.3 < right.mean() < 0.7


def test_what_texts_share_is_taught_calibrated_also_for_texts_without_a_label(task):
    random = np.random.default_rng(0)
    good = random.integers(0, 2, 400) == 1
    flipped = random.random(400) < 0.1  # one of ten labels is wrong
    texts = [f"a {'fine' if value else 'dull'} film" for value in good]
    given = ["good" if value else "bad" for value in good ^ flipped]
    labels = [label if i < 300 else None for i, label in enumerate(given)]
    taught = LinearTeacher(0).logits(labelled(texts, labels), task)
    assert taught.shape == (400, 2)
    assert taught.dtype == np.float32
    assert np.array_equal(taught.argmax(1), good)
    p = np.exp(taught).max(1) / np.exp(taught).sum(1)
    assert 0.8 < p[:300].mean() < 0.97
    assert 0.8 < p[300:].mean() < 0.97
