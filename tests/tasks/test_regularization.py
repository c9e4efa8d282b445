"""R-Drop and virtual adversarial training follow their papers' formulas."""

import math

import numpy as np
import pytest
import torch
from making import MODEL
from torch import nn

from raybert.config import build
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.settings import ModelConfig
from raybert.tasks.protocol import NO_LABEL
from raybert.tasks.regularization import (
    RegularizedLoss,
    SupervisedLoss,
    adversarial_shift,
    shifted_embeddings,
)
from raybert.tasks.settings import FinetuneConfig
from raybert.tasks.single_label import SingleLabel

VOCAB, LABELS = 40, 3


def classifier(dropout=0.0, **shape):
    torch.manual_seed(0)
    config = build(ModelConfig, {**MODEL, "dropout": dropout, **shape}, "test")
    model = Classifier(Encoder(config, VOCAB), LABELS)
    model.dropout.p = dropout
    nn.init.normal_(model.classifier.weight, std=2.0)  # so that predictions differ
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB, (4, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 5:] = mask[3, 7:] = False
    return ids, mask, torch.tensor([0, 2, 1, 1])


TASK = SingleLabel([str(label) for label in range(LABELS)])
CROSS_ENTROPY = SupervisedLoss(
    TASK.make_loss(FinetuneConfig(), np.zeros(1, np.int64)), TASK.divergence
)


def loss(model, batch, **weights):
    return RegularizedLoss(CROSS_ENTROPY, TASK.divergence, **weights)(model, model, *batch)


def loss_value(model, batch, **weights):
    return float(loss(model, batch, **weights).detach())


def test_without_regularisers_the_loss_is_the_cross_entropy(batch):
    model, (ids, mask, labels) = classifier(), batch
    expected = nn.functional.cross_entropy(model(ids, mask), labels, reduction="sum")
    assert loss_value(model, batch) == pytest.approx(float(expected.detach()))


def test_r_drop_without_dropout_equals_the_plain_loss(batch):
    """Both passes are equal: their divergence is 0, and the mean of their losses is the loss."""
    model = classifier()
    plain = loss_value(model, batch)
    assert loss_value(model, batch, r_drop=3.0) == pytest.approx(plain, rel=1e-5)


def test_r_drop_is_half_of_the_formula_in_the_paper(batch):
    ids, mask, labels = batch
    model = classifier(dropout=0.4)
    torch.manual_seed(5)
    got = loss_value(model, batch, r_drop=2.0)
    torch.manual_seed(5)
    one, two = model(ids.repeat(2, 1), mask.repeat(2, 1)).detach().chunk(2)
    assert not torch.equal(one, two)
    cross = sum(nn.functional.cross_entropy(x, labels, reduction="sum") for x in (one, two))
    p, q = one.softmax(-1), two.softmax(-1)
    apart = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    assert got == pytest.approx(0.5 * float(cross + 2.0 * apart), rel=1e-4)


@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_the_adversarial_shift_has_the_given_norm_and_is_zero_at_padding(batch, layout):
    ids, mask, _ = batch
    model = classifier(layout=layout).train()
    _, shift = adversarial_shift(model, ids, mask, 0.1, TASK.divergence)
    assert model.training
    assert float(shift[~mask].abs().max()) == 0
    with torch.no_grad():
        norm = model.encoder.embeddings.norm
        recorded = []
        handle = norm.register_forward_hook(lambda m, i, output: recorded.append(output))
        model(ids, mask)
        handle.remove()
    lengths = (recorded[0] * mask[..., None]).flatten(1).norm(dim=1)
    assert shift.flatten(1).norm(dim=1).tolist() == pytest.approx(
        (0.1 * lengths).tolist(), rel=1e-4
    )


def test_the_adversarial_shift_changes_predictions_more_than_random_ones(batch):
    ids, mask, _ = batch
    model = classifier().eval()
    expected, shift = adversarial_shift(model, ids, mask, 0.05, TASK.divergence)

    def change(by):
        with torch.no_grad(), shifted_embeddings(model, by):
            return float(TASK.divergence(expected, model(ids, mask)).sum())

    draws = []
    for seed in range(20):
        torch.manual_seed(seed)
        other = torch.randn_like(shift) * mask[..., None]
        norm = shift.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
        draws.append(change(other * norm[:, None, None]))
    assert change(shift) > max(draws)
    assert change(torch.zeros_like(shift)) == pytest.approx(0, abs=1e-6)


def test_all_forward_hooks_are_removed(batch):
    model = classifier(dropout=0.1)
    loss(model, batch, adversarial=1.0, adversarial_size=0.1, r_drop=1.0)
    assert not model.encoder.embeddings.norm._forward_hooks


@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_has_a_gradient_from_the_adversarial_loss(batch, bf16):
    """Under autocast, too, whose cache could keep weights that were cast without gradients."""
    model = classifier(dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total = loss(model, batch, adversarial=1.0, adversarial_size=0.1, r_drop=1.0)
    total.backward()
    without_gradient = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert without_gradient == []
    assert math.isfinite(float(total.detach()))


def test_texts_without_a_target_have_zero_loss(batch):
    ids, mask, _ = batch
    without_labels = (ids, mask, torch.full((4,), NO_LABEL))
    for options in ({}, {"r_drop": 1.0}, {"adversarial": 1.0, "adversarial_size": 0.1}):
        assert loss_value(classifier(), without_labels, **options) == 0
