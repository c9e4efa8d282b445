"""An fp32 encoder for inference on CPUs: packed weights, fused operations.

Linear layers use oneDNN's matrix products; PyTorch's default, MKL, takes 12 to 20% longer (a batch
of 2,040 tokens, 4 layers of 256, one core of an AMD EPYC). oneDNN applies GELU and the gate to each
block of a product while it is in the cache, and rotary embeddings take one pass over memory instead
of five: 5% more texts per second. The first layer's query-key-value product depends on the token
alone, so that it is read from a table: 4% more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.model.attention import attend
from raybert.model.attention_plan import AttentionPlan
from raybert.model.encoder import Encoder
from raybert.model.layers import Attention, EncoderLayer, FeedForward

_MAX_TABLE_BYTES = 128 << 20  # of each model in each replica
_TABLE_CHUNK = 2048  # rows of the table that are computed at once


def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's fused linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )


def pack(encoder: Encoder) -> None:
    """Replace an encoder's modules, in place, by packed ones, which have no gradients."""
    encoder.eval()
    replace_modules(encoder, encoder, _packed)
    first = encoder.layers[0]
    assert isinstance(first, EncoderLayer)
    depends_on_token_only = first.pre_norm and isinstance(first.attention_norm, nn.Identity)
    table_bytes = 4 * 4 * encoder.config.hidden_size * encoder.vocab_size  # [V, 4 D] in fp32
    if depends_on_token_only and table_bytes <= _MAX_TABLE_BYTES:
        encoder.register_module("embeddings", TokenTable(encoder))
        encoder.layers[0] = FirstLayer(first)


def replace_modules(
    target: nn.Module, source: nn.Module, convert: Callable[[nn.Module], nn.Module | None]
) -> None:
    """Replace modules of `target` in place by what `convert` makes of the same ones of `source`.

    `source` has fp32 weights and may be `target`. Where the result is None, children are visited.
    """
    for name, child in source.named_children():
        new = convert(child)
        if new is None:
            replace_modules(target.get_submodule(name), child, convert)
        else:
            target.register_module(name, new)


def _packed(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Attention):
        return PackedAttention(module)
    if isinstance(module, FeedForward):
        return PackedFeedForward(module)
    return PackedLinear(module.weight, module.bias) if isinstance(module, nn.Linear) else None


class PackedLinear(nn.Module):
    """A linear layer of `weight` [out, in]; `activation`: none or gelu."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach()
        self._activation = activation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map `x` [..., in] to [..., out], multiplied by `gate` [..., out] if given."""
        product: Any = torch.ops.mkldnn._linear_pointwise
        y: Tensor
        if gate is not None:
            y = product.binary(x, gate, self._packed, self._bias, "mul")
        else:
            y = product(x, self._packed, self._bias, self._activation, [], "none")
        return y


class PackedFeedForward(nn.Module):
    """`FeedForward` with GELU and the gate fused into its products."""

    def __init__(self, source: FeedForward) -> None:
        super().__init__()
        up = source.up
        weights = up.weight.chunk(2 if source.gated else 1)
        biases = [None] * 2 if up.bias is None else up.bias.chunk(len(weights))
        self.up = PackedLinear(weights[0], biases[0], "gelu")
        self.gate = PackedLinear(weights[1], biases[1]) if source.gated else None
        self.down = PackedLinear(source.down.weight, source.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of `x` [B, T, D]."""
        up = self.up(x)  # [B, T, I]
        y: Tensor = self.down(up if self.gate is None else self.gate(x, gate=up))
        return y


class PackedAttention(nn.Module):
    """`Attention` with the dimensions of each rotary pair next to each other.

    Queries and keys are permuted alike, so that their dot products are the same sums.
    """

    def __init__(self, source: Attention) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        rows = torch.arange(source.qkv.weight.shape[0]).view(3, self.num_heads, -1)
        half = rows.shape[-1] // 2
        first, second = rows[:2, :, :half], rows[:2, :, half : 2 * half]  # pairs: (i, i + H/2)
        rows[:2, :, : 2 * half] = torch.stack([first, second], dim=-1).flatten(-2)
        order = rows.flatten()
        bias = source.qkv.bias
        self.qkv = PackedLinear(source.qkv.weight[order], None if bias is None else bias[order])
        self.out = PackedLinear(source.out.weight, source.out.bias)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Attend from each token of `x` [B, T, D] to those that the plan allows: [B, T, D]."""
        return self.attend(self.qkv(x), plan)

    def attend(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        """As `forward`, from queries, keys and values [B, T, 3 D], which are overwritten."""
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1)  # [B, T, 3, N, H]
        if plan.cos is not None and plan.sin is not None:
            pairs = qkv[:, :, :2].view(*qkv.shape[:2], 2, self.num_heads, -1, 2)
            rotation = torch.complex(plan.cos, plan.sin)
            torch.view_as_complex(pairs).mul_(rotation)  # [B, T, 2, N, H/2]
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))  # [B, N, T, H] each
        mixed = attend(q, k, v, plan)  # [B, N, T, H]
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]
        return y


class TokenTable(nn.Module):
    """A table of each token's embedding and of its first layer's query, key and value."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        size = encoder.config.hidden_size
        qkv = encoder.layers[0].get_submodule("attention.qkv")
        self._rows = torch.empty(encoder.vocab_size, 4 * size)  # [V, 4 D]
        ids = torch.arange(encoder.vocab_size)
        with torch.no_grad():
            for begin in range(0, encoder.vocab_size, _TABLE_CHUNK):
                chunk = slice(begin, begin + _TABLE_CHUNK)
                x = encoder.embeddings(ids[None, chunk], None)[0]  # [rows, D]
                self._rows[chunk, :size], self._rows[chunk, size:] = x, qkv(x)

    def forward(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """Look up `input_ids` [B, T]: [B, T, 4 D], a new tensor; positions are not used."""
        return F.embedding(input_ids, self._rows)


class FirstLayer(nn.Module):
    """The first layer of a pre-norm encoder, on the rows of a `TokenTable`."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Transform `x` [B, T, 4 D], whose queries, keys and values are overwritten: [B, T, D]."""
        size = x.shape[-1] // 4
        x, qkv = x[..., :size], x[..., size:]
        attention = self.layer.attention
        assert isinstance(attention, PackedAttention)
        x = x + attention.attend(qkv, plan)
        y: Tensor = x + self.layer.feed_forward(self.layer.feed_forward_norm(x))
        return y
