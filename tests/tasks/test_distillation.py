"""Distillation follows the formula of its paper."""

import numpy as np
import pytest
import torch

from raybert.tasks.protocol import NO_LABEL
from raybert.tasks.regularization import SupervisedLoss
from raybert.tasks.settings import FinetuneConfig
from raybert.tasks.single_label import SingleLabel

TEXTS, LABELS = 4, 3


@pytest.fixture
def logits():
    return torch.randn(TEXTS, LABELS, generator=torch.Generator().manual_seed(1))


def loss(logits, labels, teacher, share, temperature):
    task = SingleLabel([str(label) for label in range(LABELS)])
    of_labels = task.make_loss(FinetuneConfig(), np.zeros(1, np.int64))
    total = SupervisedLoss(of_labels, task.divergence, share, temperature)
    return float(total(logits, labels, teacher))


def test_kl_divergence_is_zero_only_for_equal_distributions():
    one = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    two = torch.tensor([[2.0, -1.0, 0.5], [1.0, 0.0, 0.0]])
    divergence = SingleLabel(["a", "b", "c"]).divergence(one, two)
    assert float(divergence[0]) == pytest.approx(0, abs=1e-7)
    assert float(divergence[1]) > 1e-2


def test_labelled_texts_learn_from_both_and_others_from_the_teacher_alone(logits):
    labels = torch.tensor([0, NO_LABEL, 1, 1])
    teacher = torch.randn(TEXTS, LABELS, generator=torch.Generator().manual_seed(2))
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        p = (teacher[row] / 3).softmax(-1)
        soft = 9 * float((p * (p.log() - (logits[row] / 3).log_softmax(-1))).sum())
        if label == NO_LABEL:
            total += soft
        else:
            total += 0.25 * soft - 0.75 * float(logits[row].log_softmax(-1)[label])
    assert loss(logits, labels, teacher, 0.25, 3.0) == pytest.approx(total, rel=1e-4)


def test_the_loss_is_zero_where_student_and_teacher_agree(logits):
    unlabelled = torch.full((TEXTS,), NO_LABEL)
    assert loss(logits, unlabelled, logits, 1.0, 2.0) == pytest.approx(0, abs=1e-5)
