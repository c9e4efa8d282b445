"""Local attention in windows equals attention with a dense mask."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode

from raybert.model import attention_plan
from raybert.model.attention import attend_windows
from raybert.model.attention_plan import local_mask, text_numbers, visibility_mask, window_mask
from raybert.model.encoder import Encoder
from raybert.model.settings import ModelConfig


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_equal_a_dense_mask(data):
    rows, seq_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    half = data.draw(st.integers(1, 9))
    queries = data.draw(st.integers(half, 20))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.zeros(rows, seq_len)
    documents = padding = None
    if data.draw(st.booleans()):
        documents = (torch.rand(rows, seq_len) < 0.2).cumsum(1)
    if data.draw(st.booleans()):
        lengths = [data.draw(st.integers(1, seq_len)) for _ in range(rows)]
        padding = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    shape = (rows, seq_len, 2, 4)  # the encoder's memory layout: [B, T, N, H]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3)]
    heads = [tensor.transpose(1, 2) for tensor in inputs]
    near = window_mask(text_numbers(ids, padding, documents), half, queries)
    ours = attend_windows(*heads, near, half)
    mask = local_mask(seq_len, half, ids.device)
    visible = visibility_mask(padding, documents)
    mask = mask if visible is None else mask & visible
    # What padding attends to is of no importance, but NaN would be.
    mask = mask | (torch.eye(seq_len, dtype=torch.bool) & ~mask.any(-1, keepdim=True))
    theirs = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    real = torch.ones(rows, seq_len) if padding is None else padding.double()
    weight = torch.randn(shape[:2] + (8,), dtype=torch.float64) * real[..., None]
    gradients = []
    for mixed in (ours, theirs):
        assert torch.isfinite(mixed).all()
        rows_of = mixed.transpose(1, 2).flatten(2)
        gradients.append([rows_of * real[..., None]])
        gradients[-1] += torch.autograd.grad((rows_of * weight).sum(), inputs)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


class LargestMask(TorchFunctionMode):
    """Notes the largest boolean tensor that a function returns."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
            self.elements = max(self.elements, result.numel())
        return result


def local_encoder(every):
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=16, num_layers=2, num_heads=2, max_seq_len=96, local_attention=8,
        global_attention_every=every,
    )  # fmt: skip
    return Encoder(config, 50)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["rows", "documents", "lengths"])
def test_an_encoder_of_long_rows_equals_one_with_dense_masks(by, precision, monkeypatch):
    encoder = local_encoder(2)
    ids = torch.randint(1, 50, (2, 90))
    values = {
        "rows": {},
        "documents": {"document_ids": (torch.arange(90) >= 31).long().expand(2, 90)},
        "lengths": {"lengths": [90, 31, 59]},
    }[by]
    ids = ids.view(1, -1) if by == "lengths" else ids
    results = []
    for queries in (16, 1 << 20):  # windows, and none
        monkeypatch.setattr(attention_plan, "WINDOW_QUERIES", queries)
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            x = encoder(ids, **values).float()
        x.square().sum().backward()
        results.append([x, *(p.grad for p in encoder.layers.parameters())])
    assert any(not torch.equal(*pair) for pair in zip(*results, strict=True))
    tolerance = 1e-5 if precision == torch.float32 else 5e-2
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=tolerance)
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.abs().max()
        tolerance = 1e-4 if precision == torch.float32 else 5e-2
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


def test_rows_of_windows_make_no_mask_of_all_pairs(monkeypatch):
    monkeypatch.setattr(attention_plan, "WINDOW_QUERIES", 8)
    encoder = local_encoder(2)
    with LargestMask() as largest:
        encoder(torch.ones(2, 96, dtype=torch.int64))
    assert 0 < largest.elements < 2 * 96 * 96 / 4


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """What PyTorch documents of `torch.nn.attention.varlen.varlen_attn`, which needs a GPU."""
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q is cu_seq_k and max_q == max_k
    texts = []
    for begin, end in itertools.pairwise(cu_seq_q.tolist()):
        assert 0 <= end - begin <= max_q
        heads = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        left, right = window_size
        mask = None if left < 0 else local_mask(end - begin, left, q.device)
        assert left == right
        texts.append(F.scaled_dot_product_attention(*heads, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(texts)


@pytest.mark.parametrize("every", [1, 2])
def test_a_gpus_kernel_for_lengths_is_given_what_it_documents(every, monkeypatch):
    encoder, lengths = local_encoder(every), [90, 31, 1, 59]
    ids = torch.randint(1, 50, (1, sum(lengths)))
    expected = encoder(ids, lengths=lengths)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(Encoder, "has_varlen_kernel", lambda encoder, device: True)
    _, plan, local = encoder.plan(ids, lengths=lengths)
    assert len(plan.cu_seqlens) == 64 and plan.longest == 128 and plan.mask is None
    assert local.half_window == (None if every == 1 else 4)
    torch.testing.assert_close(encoder(ids, lengths=lengths), expected, rtol=0, atol=1e-5)
