"""The optimizer's parameter groups, and its state saved and restored."""

import pytest
import torch
from torch import nn

from raybert.config import build
from raybert.errors import ConfigError
from raybert.train.optimizers import (
    OPTIMIZERS,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_lr,
)
from raybert.train.settings import TrainConfig


def config(**values):
    return TrainConfig(steps=100, **values)


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


def test_the_configuration_accepts_the_registered_optimizers_only():
    for name in OPTIMIZERS:
        optimizer = make_optimizer(Model(), build(TrainConfig, {"optimizer": name}, "test"))
        assert len(optimizer.param_groups) == 2  # with and without weight decay
    with pytest.raises(ConfigError, match="optimizer='lion': input should be 'adamw' or 'sgd'"):
        build(TrainConfig, {"optimizer": "lion"}, "test")
