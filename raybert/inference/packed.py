"""An encoder in fp32 on CPUs, without gradients: weights packed, and fewer passes over memory.

Dense layers take oneDNN's products, where PyTorch takes MKL's: those need 12 to 20% longer (a batch
of 2,040 tokens, 4 layers of 256, one core of an AMD EPYC). What a product's result goes through
next is done by oneDNN while it is in the cache, and rotary positions take one pass, not five: that
scores 5% more texts. The first product, whose result depends on the token alone, is looked up: 4%
more. What is left are products, at 105 GFLOP/s of the 116 that the core can do, and attention.

Shapes: B batch, T tokens, D hidden, I intermediate, N heads, H head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.model.attention import attend, attend_varlen
from raybert.model.attention_plan import AttentionPlan
from raybert.model.encoder import Encoder
from raybert.model.layers import Attention, EncoderLayer, FeedForward

#: Bytes, for each model in each replica. The more layers, the less their first product matters.
_LARGEST_TABLE = 128 << 20
_TABLE_ROWS = 2048  # computed at once


def can_pack() -> bool:
    """Whether this PyTorch has oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )


def pack(encoder: Encoder) -> None:
    """Replace the parts of an encoder, in place: from then on it has no gradients."""
    encoder.eval()
    replace_parts(encoder, encoder, packed_part)
    first = encoder.layers[0]
    assert isinstance(first, EncoderLayer)
    by_token = first.pre_norm and isinstance(first.attention_norm, nn.Identity)
    if by_token and TokenTable.size(encoder) <= _LARGEST_TABLE:
        encoder.register_module("embeddings", TokenTable(encoder))
        encoder.layers[0] = FirstLayer(first)


def replace_parts(
    module: nn.Module, exact: nn.Module, made: Callable[[nn.Module], nn.Module | None]
) -> None:
    """Put what is made of the parts of a module in fp32 into the place of the same parts."""
    for name, part in exact.named_children():
        new = made(part)
        if new is None:
            replace_parts(module.get_submodule(name), part, made)
        else:
            module.register_module(name, new)


def packed_part(part: nn.Module) -> nn.Module | None:
    """What takes the place of a part; None: its own parts are looked at."""
    if isinstance(part, Attention):
        return PackedAttention(part)
    if isinstance(part, FeedForward):
        return PackedFeedForward(part)
    return PackedLinear(part.weight, part.bias) if isinstance(part, nn.Linear) else None


class PackedLinear(nn.Module):
    """A dense layer of `weight` [out, in]; `activation`: none, or gelu."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach()
        self._activation = activation

    def forward(self, x: Tensor, times: Tensor | None = None) -> Tensor:
        """Map `x` [..., in] to [..., out]; `times` [..., out]: what the result is multiplied by."""
        product: Any = torch.ops.mkldnn._linear_pointwise
        y: Tensor
        if times is not None:
            y = product.binary(x, times, self._packed, self._bias, "mul")
        else:
            y = product(x, self._packed, self._bias, self._activation, [], "none")
        return y


class PackedFeedForward(nn.Module):
    """What `exact` computes, by products alone."""

    def __init__(self, exact: FeedForward) -> None:
        super().__init__()
        weights = exact.up.weight.chunk(2 if exact.gated else 1)
        biases = [None] * 2 if exact.up.bias is None else exact.up.bias.chunk(len(weights))
        self.up = PackedLinear(weights[0], biases[0], "gelu")
        self.gate = PackedLinear(weights[1], biases[1]) if exact.gated else None
        self.down = PackedLinear(exact.down.weight, exact.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, T, D], each token by itself."""
        up = self.up(x)  # [B, T, I]
        y: Tensor = self.down(up if self.gate is None else self.gate(x, times=up))
        return y


class PackedAttention(nn.Module):
    """What `exact` computes, with the pairs that rotary positions turn beside each other.

    Scores are sums over a head's dimensions, whose order they don't depend on.
    """

    def __init__(self, exact: Attention) -> None:
        super().__init__()
        self.num_heads = exact.num_heads
        rows = torch.arange(exact.qkv.weight.shape[0]).view(3, self.num_heads, -1)
        half = rows.shape[-1] // 2
        first, second = rows[:2, :, :half], rows[:2, :, half : 2 * half]  # pairs: (i, i + H/2)
        rows[:2, :, : 2 * half] = torch.stack([first, second], dim=-1).flatten(-2)
        order = rows.flatten()
        bias = exact.qkv.bias
        self.qkv = PackedLinear(exact.qkv.weight[order], None if bias is None else bias[order])
        self.out = PackedLinear(exact.out.weight, exact.out.bias)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Mix `x` [B, T, D] over the tokens that each one may see."""
        return self.mix(self.qkv(x), plan)

    def mix(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        """Mix by queries, keys and values [B, T, 3 D], which are overwritten: [B, T, D]."""
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1)  # [B, T, 3, N, H]
        if plan.cos is not None and plan.sin is not None:
            turned = qkv[:, :, :2].view(*qkv.shape[:2], 2, self.num_heads, -1, 2)
            turn = torch.complex(plan.cos, plan.sin)
            torch.view_as_complex(turned).mul_(turn)  # [B, T, 2, N, H/2]
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))  # [B, N, T, H] each
        if plan.lengths is None:
            mixed = attend(q, k, v, plan.mask)
        else:
            mixed = attend_varlen(q, k, v, plan.lengths, plan.half_window)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]
        return y


class TokenTable(nn.Module):
    """Looks up tokens: their embeddings, and the first layer's queries, keys and values of them."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        size = encoder.config.hidden_size
        product = encoder.layers[0].get_submodule("attention.qkv")
        self._rows = torch.empty(encoder.vocab_size, 4 * size)  # [V, 4 D]
        ids = torch.arange(encoder.vocab_size)
        with torch.no_grad():
            for begin in range(0, encoder.vocab_size, _TABLE_ROWS):
                at = slice(begin, begin + _TABLE_ROWS)
                x = encoder.embeddings(ids[None, at], None)[0]  # [rows, D]
                self._rows[at, :size], self._rows[at, size:] = x, product(x)

    @staticmethod
    def size(encoder: Encoder) -> int:
        """The bytes of an encoder's table: 4 D numbers in fp32 a token."""
        return 4 * 4 * encoder.config.hidden_size * encoder.vocab_size

    def forward(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """Look up `input_ids` [B, T], wherever they stand: [B, T, 4 D], a copy to write to."""
        return F.embedding(input_ids, self._rows)


class FirstLayer(nn.Module):
    """What the first layer, one that normalises before, computes of what a `TokenTable` gives."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Transform `x` [B, T, 4 D], which is overwritten, into [B, T, D]."""
        size = x.shape[-1] // 4
        x, qkv = x[..., :size], x[..., size:]
        attention = self.layer.attention
        assert isinstance(attention, PackedAttention)
        x = x + attention.mix(qkv, plan)
        y: Tensor = x + self.layer.feed_forward(self.layer.feed_forward_norm(x))
        return y
