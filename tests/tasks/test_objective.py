"""The loss of fine-tuning: its parts by their formulas, and what a shift does."""

import math

import pytest
import torch
from making import MODEL
from torch import nn

from raybert.config import build
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.settings import ModelConfig
from raybert.tasks.objective import Objective, adversarial_shift, divergence, shifted
from raybert.tasks.texts import NO_LABEL

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


def loss(objective, model, batch, teacher=None):
    return objective.loss(model, model, *batch, teacher)


def value(*given):
    return float(loss(*given).detach())


def test_without_options_it_is_the_cross_entropy(batch):
    model, (ids, mask, labels) = classifier(), batch
    expected = nn.functional.cross_entropy(model(ids, mask), labels, reduction="sum")
    assert value(Objective(), model, batch) == pytest.approx(float(expected.detach()))


def test_two_passes_that_agree_cost_what_one_costs(batch):
    """Without dropout the second pass is the first: R-Drop adds nothing, and halves both."""
    model = classifier()
    plain = value(Objective(), model, batch)
    assert value(Objective(r_drop=3.0), model, batch) == pytest.approx(plain, rel=1e-5)


def test_r_drop_is_half_of_the_papers_formula(batch):
    ids, mask, labels = batch
    model = classifier(dropout=0.4)
    torch.manual_seed(5)
    got = value(Objective(r_drop=2.0), model, batch)
    torch.manual_seed(5)
    one, two = model(ids.repeat(2, 1), mask.repeat(2, 1)).detach().chunk(2)
    assert not torch.equal(one, two)
    cross = sum(nn.functional.cross_entropy(x, labels, reduction="sum") for x in (one, two))
    p, q = one.softmax(-1), two.softmax(-1)
    apart = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    assert got == pytest.approx(0.5 * float(cross + 2.0 * apart), rel=1e-4)


def test_divergence_is_zero_for_equals_alone():
    one = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]]).log_softmax(-1)
    two = torch.tensor([[2.0, -1.0, 0.5], [1.0, 0.0, 0.0]]).log_softmax(-1)
    found = divergence(one, two)
    assert float(found[0]) == pytest.approx(0, abs=1e-7)
    assert float(found[1]) > 1e-2


@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_a_shift_has_its_size_and_spares_padding(batch, layout):
    ids, mask, _ = batch
    model = classifier(layout=layout).train()
    _, shift = adversarial_shift(model, ids, mask, 0.1)
    assert model.training
    assert float(shift[~mask].abs().max()) == 0
    with torch.no_grad():
        embeddings = model.encoder.embeddings.norm
        seen = []
        handle = embeddings.register_forward_hook(lambda m, i, output: seen.append(output))
        model(ids, mask)
        handle.remove()
    lengths = (seen[0] * mask[..., None]).flatten(1).norm(dim=1)
    assert shift.flatten(1).norm(dim=1).tolist() == pytest.approx(
        (0.1 * lengths).tolist(), rel=1e-4
    )


def test_a_shift_changes_more_than_a_random_one_of_its_size(batch):
    ids, mask, _ = batch
    model = classifier().eval()
    expected, shift = adversarial_shift(model, ids, mask, 0.05)

    def change(by):
        with torch.no_grad(), shifted(model, by):
            return float(divergence(expected, model(ids, mask).log_softmax(-1)).sum())

    draws = []
    for seed in range(20):
        torch.manual_seed(seed)
        other = torch.randn_like(shift) * mask[..., None]
        norm = shift.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
        draws.append(change(other * norm[:, None, None]))
    assert change(shift) > max(draws)
    assert change(torch.zeros_like(shift)) == pytest.approx(0, abs=1e-6)


def test_no_hook_is_left_behind(batch):
    model = classifier(dropout=0.1)
    loss(Objective(adversarial=1.0, adversarial_size=0.1, r_drop=1.0), model, batch)
    assert not model.encoder.embeddings.norm._forward_hooks


@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_learns_from_the_adversarial_loss(batch, bf16):
    """Under autocast, too, where a pass without gradients could leave its weights behind."""
    model = classifier(dropout=0.1)
    objective = Objective(adversarial=1.0, adversarial_size=0.1, r_drop=1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total = loss(objective, model, batch)
    total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert math.isfinite(float(total.detach()))


def test_texts_that_count_for_nothing_cost_nothing(batch):
    ids, mask, _ = batch
    nothing = (ids, mask, torch.full((4,), NO_LABEL))
    for options in ({}, {"r_drop": 1.0}, {"adversarial": 1.0, "adversarial_size": 0.1}):
        assert value(Objective(**options), classifier(), nothing) == 0


def test_a_teacher_is_followed_by_the_formula(batch):
    ids, mask, _ = batch
    model = classifier()
    labels = torch.tensor([0, NO_LABEL, 1, 1])
    teacher = torch.randn(4, LABELS)
    objective = Objective(teacher_share=0.25, temperature=3.0)
    got = value(objective, model, (ids, mask, labels), teacher)
    logits = model(ids, mask).detach()
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        p = (teacher[row] / 3).softmax(-1)
        soft = 9 * float((p * (p.log() - (logits[row] / 3).log_softmax(-1))).sum())
        if label == NO_LABEL:
            total += soft
        else:
            total += 0.25 * soft - 0.75 * float(logits[row].log_softmax(-1)[label])
    assert got == pytest.approx(total, rel=1e-4)


def test_the_teachers_own_answers_cost_nothing(batch):
    ids, mask, _ = batch
    model = classifier()
    objective = Objective(teacher_share=1.0, temperature=2.0)
    teacher = model(ids, mask).detach()
    unlabelled = (ids, mask, torch.full((4,), NO_LABEL))
    assert value(objective, model, unlabelled, teacher) == pytest.approx(0, abs=1e-5)
