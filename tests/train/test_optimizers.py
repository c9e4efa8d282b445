"""The schedule's exact values, the optimizer's groups, and its state there and back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raybert.train.optimizers import (
    average_weights,
    averaged,
    averages_in,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    schedule_at,
    set_lr,
)
from raybert.train.settings import TrainConfig


def config(**values):
    return TrainConfig(steps=100, **values)


# A run of 100 steps of which 10 warm up: what the learning rate is multiplied by.
@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("linear", 0, 1 / 11),
        ("linear", 4, 5 / 11),
        ("linear", 9, 10 / 11),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 99, 1 / 90),
        ("linear", 100, 0.0),
        ("cosine", 9, 10 / 11),
        ("cosine", 10, 1.0),
        ("cosine", 40, 0.75),
        ("cosine", 55, 0.5),
        ("cosine", 70, 0.25),
        ("cosine", 100, 0.0),
        ("constant", 3, 4 / 11),
        ("constant", 10, 1.0),
        ("constant", 99, 1.0),
        ("stable-decay", 9, 10 / 11),
        ("stable-decay", 50, 1.0),
        ("stable-decay", 80, 1.0),
        ("stable-decay", 85, 0.75),
        ("stable-decay", 95, 0.25),
        ("stable-decay", 100, 0.0),
    ],
)
def test_the_learning_rate_at_a_step(schedule, step, share):
    got = schedule_at(step, 100, 10, config(schedule=schedule, decay_fraction=0.2))
    assert got == pytest.approx(share, abs=1e-12)


@given(
    schedule=st.sampled_from(["linear", "cosine", "stable-decay", "constant"]),
    total=st.integers(1, 10_000),
    data=st.data(),
)
def test_the_learning_rate_stays_between_zero_and_its_peak(schedule, total, data):
    warmup = data.draw(st.integers(0, total))
    step = data.draw(st.integers(0, total + 5))
    share = schedule_at(step, total, warmup, config(schedule=schedule))
    assert 0 <= share <= 1
    assert math.isfinite(share)
    if step < warmup:
        assert share < schedule_at(step + 1, total, warmup, config(schedule="constant"))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, ids):
        return self.norm(self.linear(self.embedding(ids))).square().sum()


def test_matrices_decay_and_vectors_do_not():
    optimizer = make_optimizer(Model(), config(weight_decay=0.1, lr=0.5, betas=(0.8, 0.9)))
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert decays == {
        "embedding.weight": 0.1,
        "linear.weight": 0.1,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)


def test_each_parameter_learns_at_its_share():
    shares = {"embedding.weight": 0.25, "linear.weight": 0.5, "linear.bias": 0.5}
    optimizer = make_optimizer(Model(), config(), lambda name: shares.get(name, 1.0))
    set_lr(optimizer, 0.2)
    lrs = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert lrs == pytest.approx(
        {
            "embedding.weight": 0.05,
            "linear.weight": 0.1,
            "linear.bias": 0.1,
            "norm.weight": 0.2,
            "norm.bias": 0.2,
        }
    )


def step(model, optimizer):
    model(torch.tensor([0, 3, 1])).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_optimizer_takes_the_same_steps():
    torch.manual_seed(0)
    model = Model()
    optimizer = make_optimizer(model, config(lr=0.1))
    for _ in range(3):
        step(model, optimizer)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    assert len(tensors) == 5 * 3  # two moments and a counter for each parameter
    other = Model()
    other.load_state_dict(model.state_dict())
    restored = make_optimizer(other, config(lr=0.1))
    restore_optimizer(restored, tensors)
    for _ in range(2):
        step(model, optimizer)
        step(other, restored)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    fresh = Model()
    fresh.load_state_dict(model.state_dict())
    step(fresh, make_optimizer(fresh, config(lr=0.1)))
    step(model, optimizer)
    assert not torch.equal(fresh.linear.weight, model.linear.weight)  # the state matters


def test_restoring_forgets_what_was_there():
    model = Model()
    optimizer = make_optimizer(model, config())
    step(model, optimizer)
    restore_optimizer(optimizer, {})
    assert optimizer_tensors(optimizer) == {}


def test_averages_follow_the_weights_by_the_formula():
    torch.manual_seed(0)
    model = Model()
    optimizer = make_optimizer(model, config(lr=0.1))
    expected = None
    for number in range(6):
        step(model, optimizer)
        average_weights(optimizer, 0.5, number)
        weight = model.linear.weight.detach().clone()
        kept = min(0.5, (1 + number) / (10 + number))
        expected = weight if expected is None else kept * expected + (1 - kept) * weight
    found = averages_in(optimizer_tensors(optimizer))
    assert found.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found["linear.weight"], expected)
    assert not torch.equal(found["linear.weight"], model.linear.weight)


def test_averages_take_the_weights_place_and_leave_it_bit_for_bit():
    torch.manual_seed(0)
    model = Model()
    model.norm.requires_grad_(False)  # never trained: its own average
    optimizer = make_optimizer(model, config(lr=0.1))
    for number in range(3):
        step(model, optimizer)
        average_weights(optimizer, 0.9, number)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    averages = averages_in({k: v.clone() for k, v in optimizer_tensors(optimizer).items()})
    assert "norm.weight" not in averages
    with averaged(optimizer):
        inside = {k: v.clone() for k, v in model.state_dict().items()}
    assert {k for k in before if not torch.equal(inside[k], before[k])} == set(averages)
    for name, average in averages.items():
        assert torch.equal(inside[name], average)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
