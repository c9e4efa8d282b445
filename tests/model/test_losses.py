import pytest
import torch
import torch.nn.functional as F

from raybert.model import losses
from raybert.model.losses import linear_cross_entropy


def problem(positions=37, hidden=16, vocab=211, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, hidden, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=dtype)
    bias = torch.randn(vocab, generator=generator, dtype=dtype)
    targets = torch.randint(vocab, (positions,), generator=generator)
    return [t.requires_grad_() for t in (x, weight, bias)], targets


def reference(x, weight, bias, targets):
    return F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")


@pytest.mark.parametrize("columns", [2, 8])  # of CPUs and of GPUs
@pytest.mark.parametrize("hidden", [15, 16])
@pytest.mark.parametrize("chunk", [1, 211 * 5, 211 * 37, 1 << 24])
def test_fp32_equals_the_plain_cross_entropy_for_any_chunk_size(
    chunk, hidden, columns, monkeypatch
):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(losses, "BIAS_COLUMNS", {"cpu": columns})
    inputs, targets = problem(hidden=hidden)
    expected = reference(*inputs, targets)
    expected_gradients = torch.autograd.grad(expected / 7, inputs)
    total = linear_cross_entropy(*inputs, targets)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(total / 7, inputs), expected_gradients, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_pass_gradcheck():
    inputs, targets = problem(5, 4, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: linear_cross_entropy(*a, targets), inputs)


def test_bf16_stays_within_the_documented_error():
    inputs, targets = problem(512, 64, 2000)
    with torch.no_grad():
        inputs[1] *= 0.3  # logits with a deviation of 2.4
    expected = reference(*inputs, targets)
    expected_gradients = torch.autograd.grad(expected, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(*inputs, targets)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=3e-4, atol=0)
    for ours, theirs in zip(torch.autograd.grad(total, inputs), expected_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_without_gradients_the_sum_is_the_same():
    inputs, targets = problem()
    with torch.no_grad():
        total = linear_cross_entropy(*inputs, targets)
    assert total.grad_fn is None
    assert torch.equal(total, linear_cross_entropy(*inputs, targets))


def test_no_positions_give_zero_loss_and_zero_gradients():
    inputs, targets = problem(positions=0)
    total = linear_cross_entropy(*inputs, targets)
    total.backward()
    assert total == 0
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)


def test_a_target_of_probability_zero_gives_a_finite_loss_and_its_gradient():
    x = torch.tensor([[500.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total = linear_cross_entropy(x, weight, torch.zeros(2), torch.tensor([1]))
    total.backward()
    assert torch.isfinite(total)
    torch.testing.assert_close(x.grad, torch.tensor([[2.0]]))  # the gradient is not clipped


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_give_a_non_finite_loss(bad):
    inputs, targets = problem()
    with torch.no_grad():
        inputs[0][3, 2] = bad
    assert not torch.isfinite(linear_cross_entropy(*inputs, targets))


def test_padding_positions_count_for_nothing():
    inputs, targets = problem()
    expected = linear_cross_entropy(*inputs, targets)
    gradients = torch.autograd.grad(expected, inputs)
    x = torch.cat([inputs[0], torch.full((5, 16), float("nan"))]).detach().requires_grad_()
    padded = torch.cat([targets, torch.full((5,), -100)])
    total = linear_cross_entropy(x, *inputs[1:], padded)
    torch.testing.assert_close(total, expected)
    ours = torch.autograd.grad(total, [x, *inputs[1:]])
    assert not ours[0][37:].any()
    for one, two in zip((ours[0][:37], *ours[1:]), gradients, strict=True):
        torch.testing.assert_close(one, two)
