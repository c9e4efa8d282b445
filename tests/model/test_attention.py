"""Attention in plain products is PyTorch's own attention; our dropout is PyTorch's own in law."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.model import attention
from raybert.model.attention import Dropout, attend, attend_by_products

B, N, T, H = 3, 2, 5, 4


def masks() -> dict[str, Tensor | None]:
    padding = torch.ones(B, 1, 1, T, dtype=torch.bool)
    padding[1, ..., 3:] = False
    near = torch.eye(T, dtype=torch.bool)[None, None]
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 2, 2], [0, 0, 0, 0, 0]])
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    return {"none": None, "padding": padding, "near": near, "documents": same}


def heads(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    # As the encoder has them: [B, T, N, H] in memory.
    return [torch.randn(B, T, N, H, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
@pytest.mark.parametrize("chunk", [1, 2 * N * T * T, 1 << 21])  # one text, two of three, all
def test_products_are_attention(
    mask: Tensor | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK_SCORES", chunk)
    weight = torch.randn(B, N, T, H, dtype=torch.float64)
    results = []
    for attention_of in (attend_by_products, F.scaled_dot_product_attention):
        inputs = heads(torch.float64)
        out = attention_of(*inputs, mask)
        gradients = torch.autograd.grad((out * weight).sum(), inputs)
        results.append([out, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_bf16_attention_is_near_that_of_fp32(mask: Tensor | None) -> None:
    rounded = heads(torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in rounded]
    weight = torch.randn(B, N, T, H)
    for ours, theirs in zip(
        [out := attend(*rounded, mask), *torch.autograd.grad((out * weight).sum(), rounded)],
        [out := attend(*exact, mask), *torch.autograd.grad((out * weight).sum(), exact)],
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("mean", [0.0, 3.0])  # keys and values of one direction, as trained ones
def test_bf16_gradients_are_those_of_fp64(head_dim: int, mean: float) -> None:
    torch.manual_seed(0)
    shape = (2, 2, 128, head_dim)
    exact = [torch.randn(shape, dtype=torch.float64) + shift for shift in (0.0, mean, mean)]
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in exact]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    weight = torch.randn(shape, dtype=torch.float64)
    ours = torch.autograd.grad((attend(*rounded, None) * weight).sum(), rounded)
    theirs = torch.autograd.grad((attend(*exact, None) * weight).sum(), exact)
    for rough, right in zip(ours, theirs, strict=True):
        assert (rough.double() - right).norm() < 0.04 * right.norm()


def test_a_token_that_sees_nothing_spoils_nothing() -> None:
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    mask[0, 0, 2] = False
    inputs = heads(torch.bfloat16)
    out = attend(*inputs, mask)
    assert torch.isfinite(out).all()
    for gradient in torch.autograd.grad(out.float().square().sum(), inputs):
        assert torch.isfinite(gradient).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # dynamo's own
def test_a_compiled_model_computes_the_same() -> None:
    inputs = heads(torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, None), backend="aot_eager")
    plain = torch.autograd.grad(attend(*inputs, None).float().sum(), inputs)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*inputs).float().sum(), inputs), plain, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_long_rows_keep_no_probabilities() -> None:
    seq_len = attention.MOST_TOKENS + 1
    q, k, v = (torch.randn(1, 1, seq_len, 8, dtype=torch.bfloat16) for _ in range(3))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        attend(q.requires_grad_(), k, v, None)
    assert max(saved) < seq_len**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 401, dtype=dtype, requires_grad=True)  # not a multiple of four draws
    out = Dropout(p)(x)
    dropped = out == 0
    assert float(dropped.float().mean()) == pytest.approx(p, abs=0.005)  # over four sigmas
    # Neighbours are drawn from the same 64 bits, and yet know nothing of each other.
    both = (dropped[:, :-1] & dropped[:, 1:]).float().mean()
    assert float(both) == pytest.approx(p * p, abs=0.01)
    kept = out[~dropped].float()
    rounding = 2**-12 if dtype == torch.float32 else 2**-8  # of p, or of the scale
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=rounding, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, out.detach())


def test_dropout_follows_the_seed() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(1)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(first, second)


def test_dropout_is_nothing_outside_of_training() -> None:
    x = torch.ones(8)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.isfinite(Dropout(1 - 1e-9)(x)).all()
