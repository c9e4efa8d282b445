"""The optimizer's parameter groups, and its state saved and restored."""

import pytest
import torch
from making import same_tensors
from torch import nn

from raybert.config import build
from raybert.errors import ConfigError
from raybert.train.optimizers import (
    OPTIMIZERS,
    Mixed,
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


class Layered(Model):
    """Has a matrix in a layer of an encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})

    def forward(self, ids):
        x = self.encoder["layers"][0](self.embedding(ids))
        return self.norm(self.linear(x)).square().sum()


MATRIX = "encoder.layers.0.weight"


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_parameter_learns_at_its_share(name):
    shares = {"embedding.weight": 0.25, "linear.weight": 0.5, "linear.bias": 0.5, MATRIX: 0.75}
    optimizer = make_optimizer(Layered(), config(optimizer=name), lambda n: shares.get(n, 1.0))
    set_lr(optimizer, 0.2)
    lrs = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert lrs == pytest.approx(
        {
            MATRIX: 0.15,
            "encoder.layers.0.bias": 0.2,
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


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest():
    torch.manual_seed(0)
    models = [Layered() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    settings = {"lr": 0.1, "weight_decay": 0.2}
    for name, model in zip(("muon", "adamw"), models[:2], strict=True):
        optimizer = make_optimizer(model, config(optimizer=name, **settings))
        set_lr(optimizer, 0.05)
        step(model, optimizer)
    matrix = models[2].get_parameter(MATRIX)
    alone = torch.optim.Muon([matrix], lr=0.05, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    step(models[2], alone)
    mixed, adamw = (dict(model.named_parameters()) for model in models[:2])
    assert [name for name in mixed if not torch.equal(mixed[name], adamw[name])] == [MATRIX]
    assert torch.equal(mixed[MATRIX], matrix)


def test_a_parameter_belongs_to_one_part_of_a_mixed_optimizer():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Mixed(torch.optim.SGD([weight]), torch.optim.SGD([weight]))


@pytest.mark.parametrize(("name", "count"), [("adamw", 7 * 3), ("muon", 6 * 3 + 1)])
def test_a_restored_optimizer_takes_the_same_steps(name, count):
    torch.manual_seed(0)
    model, settings = Layered(), config(lr=0.1, optimizer=name)
    optimizer = make_optimizer(model, settings)
    for _ in range(3):
        step(model, optimizer)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    assert len(tensors) == count  # AdamW: two moments and a counter; Muon: the momentum
    other = Layered()
    other.load_state_dict(model.state_dict())
    restored = make_optimizer(other, settings)
    restore_optimizer(restored, tensors)
    for _ in range(2):
        step(model, optimizer)
        step(other, restored)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    fresh = Layered()
    fresh.load_state_dict(model.state_dict())
    step(fresh, make_optimizer(fresh, settings))
    step(model, optimizer)
    for one, two in ((fresh.linear, model.linear), (fresh.encoder, model.encoder)):
        assert not same_tensors(one.state_dict(), two.state_dict())  # the state matters


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
    with pytest.raises(
        ConfigError, match="optimizer='lion': input should be 'adamw', 'muon' or 'sgd'"
    ):
        build(TrainConfig, {"optimizer": "lion"}, "test")
