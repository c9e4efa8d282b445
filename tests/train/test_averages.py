"""Moving averages of the weights: their values, and their exchange with the weights."""

import pytest
import torch
from making import same_tensors
from torch import nn

from raybert.train.averages import WeightAverages


def trained_step(model, averages, number):
    """A step that changes every weight that is trained, and the averages after it."""
    model(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    averages.update(number)
    model.zero_grad(set_to_none=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def test_averages_follow_the_weights_by_the_formula(model):
    averages, expected = WeightAverages(model, 0.5), None
    for number in range(6):
        trained_step(model, averages, number)
        weight = model[0].weight.detach().clone()
        kept = min(0.5, (1 + number) / (10 + number))
        expected = weight if expected is None else kept * expected + (1 - kept) * weight
    found = averages.tensors()
    assert found.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found["0.weight"], expected)
    assert not torch.equal(found["0.weight"], model[0].weight)


def test_averages_take_the_place_of_the_weights_and_leave_it_bit_for_bit(model):
    model[1].requires_grad_(False)  # never trained: it has no average
    averages = WeightAverages(model, 0.9)
    for number in range(3):
        trained_step(model, averages, number)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {k: v.clone() for k, v in averages.tensors().items()}
    assert expected.keys() == {"0.weight", "0.bias"}
    with averages.swapped_in():
        inside = {k: v.clone() for k, v in model.state_dict().items()}
    assert {k for k in before if not torch.equal(inside[k], before[k])} == expected.keys()
    for name, average in expected.items():
        assert torch.equal(inside[name], average)
        assert torch.equal(averages.tensors()[name], average)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_the_average_of_a_layer_begins_when_it_thaws(model):
    averages = WeightAverages(model, 0.9)
    model[0].requires_grad_(False)
    for number in range(5):
        trained_step(model, averages, number)
    model[0].requires_grad_(True)
    trained_step(model, averages, 5)
    assert torch.equal(averages.tensors()["0.weight"], model[0].weight)
    assert not torch.equal(averages.tensors()["1.weight"], model[1].weight)


def test_restored_averages_continue_bit_for_bit(model):
    averages, other = WeightAverages(model, 0.9), WeightAverages(model, 0.9)
    trained_step(model, averages, 0)
    other.restore({k: v.clone() for k, v in averages.tensors().items()})
    for number in (1, 2):
        trained_step(model, averages, number)
        other.update(number)
    assert not torch.equal(averages.tensors()["0.weight"], model[0].weight)
    assert same_tensors(other.tensors(), averages.tensors())


def test_without_a_decay_there_are_no_averages(model):
    averages = WeightAverages(model, 0.0)
    trained_step(model, averages, 0)
    averages.restore({"0.weight": torch.zeros(3, 4)})
    assert averages.tensors() == {}
    before = model[0].weight.clone()
    with averages.swapped_in():
        assert torch.equal(model[0].weight, before)
