"""Attention in plain matrix products computes what PyTorch's fused attention computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.model import attention
from raybert.model.attention import attend_batch, attend_with_matmuls

B, N, T, H = 3, 2, 5, 4


def masks() -> dict[str, Tensor | None]:
    padding = torch.ones(B, 1, 1, T, dtype=torch.bool)
    padding[1, ..., 3:] = False
    near = torch.eye(T, dtype=torch.bool)[None, None]
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 2, 2], [0, 0, 0, 0, 0]])
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    return {"none": None, "padding": padding, "local": near, "documents": same}


def heads(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    # The encoder's memory layout: [B, T, N, H].
    return [torch.randn(B, T, N, H, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
@pytest.mark.parametrize(
    "chunk", [1, 2 * N * T * T, 1 << 21]
)  # one text a chunk, two of three, all
def test_matmul_attention_equals_the_fused_kernel(
    mask: Tensor | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK_SCORES", chunk)
    weight = torch.randn(B, N, T, H, dtype=torch.float64)
    results = []
    for attention_of in (attend_with_matmuls, F.scaled_dot_product_attention):
        inputs = heads(torch.float64)
        out = attention_of(*inputs, mask)
        gradients = torch.autograd.grad((out * weight).sum(), inputs)
        results.append([out, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_bf16_attention_and_its_gradients_are_close_to_fp32(mask: Tensor | None) -> None:
    rounded = heads(torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in rounded]
    weight = torch.randn(B, N, T, H)
    for ours, theirs in zip(
        [out := attend_batch(*rounded, mask), *torch.autograd.grad((out * weight).sum(), rounded)],
        [out := attend_batch(*exact, mask), *torch.autograd.grad((out * weight).sum(), exact)],
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("mean", [0.0, 3.0])  # 3.0: a common direction, as in trained models
def test_bf16_gradients_are_close_to_fp64(head_dim: int, mean: float) -> None:
    torch.manual_seed(0)
    shape = (2, 2, 128, head_dim)
    exact = [torch.randn(shape, dtype=torch.float64) + shift for shift in (0.0, mean, mean)]
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in exact]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    weight = torch.randn(shape, dtype=torch.float64)
    ours = torch.autograd.grad((attend_batch(*rounded, None) * weight).sum(), rounded)
    theirs = torch.autograd.grad((attend_batch(*exact, None) * weight).sum(), exact)
    for rough, right in zip(ours, theirs, strict=True):
        assert (rough.double() - right).norm() < 0.04 * right.norm()


def test_a_fully_masked_token_gives_finite_values_and_gradients() -> None:
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    mask[0, 0, 2] = False
    inputs = heads(torch.bfloat16)
    out = attend_batch(*inputs, mask)
    assert torch.isfinite(out).all()
    for gradient in torch.autograd.grad(out.float().square().sum(), inputs):
        assert torch.isfinite(gradient).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # dynamo's own
def test_compiled_attention_has_the_same_gradients() -> None:
    inputs = heads(torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attend_batch(q, k, v, None), backend="aot_eager")
    plain = torch.autograd.grad(attend_batch(*inputs, None).float().sum(), inputs)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*inputs).float().sum(), inputs), plain, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_long_rows_do_not_store_the_probabilities_for_backward() -> None:
    seq_len = attention.MAX_MATMUL_TOKENS + 1
    q, k, v = (torch.randn(1, 1, seq_len, 8, dtype=torch.bfloat16) for _ in range(3))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        attend_batch(q.requires_grad_(), k, v, None)
    assert max(saved) < seq_len**2
