"""The encoder's layers, in two layouts that `transformers` knows.

`modern` is ModernBERT (arXiv 2412.13663, section 2.1): normalised before each sublayer, rotary
positions, GeGLU, no biases. `classic` is BERT (arXiv 1810.04805): normalised after each sublayer,
learned positions, GELU, biases. `model.huggingface` maps the parameter names to the two layouts.

Shapes: B batch, T tokens, D hidden, N heads, H head dim, I intermediate, V vocabulary.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raybert.model.attention import attend
from raybert.model.attention_plan import AttentionPlan
from raybert.model.settings import ModelConfig

_LAYER = re.compile(r"layers?\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """The layer that a module or parameter is in, by its name; None: it is in none.

    Names are raybert's or those of transformers: `encoder.layers.3.`, `roberta.encoder.layer.3.`.
    """
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def rotary_angles(config: ModelConfig, theta: float) -> Tensor:
    """Position times frequency, fp32 [max_seq_len, H/2] (arXiv 2104.09864, equation 15)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # [H/2]
    return torch.outer(torch.arange(config.max_seq_len).float(), 1.0 / theta**exponents)


def apply_rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the queries and keys in [B, T, 3, N, H]; the values stay as they are.

    `cos` and `sin` [B or 1, T, 1, 1, H/2] are rounded to the dtype of `qkv`, as in transformers.
    """
    rotate = _Rotary.apply if qkv.requires_grad else _rotate
    rotated: Tensor = rotate(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype))
    return rotated


class _Rotary(torch.autograd.Function):
    """`_rotate` with its backward pass: autograd's own takes twice as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(qkv, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # the inverse of a rotation


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of the queries and keys in [B, T, 3, N, H]."""
    if torch.compiler.is_compiling():  # the compiler turns writes in place into masks per element
        first, second = qkv[:, :, :2].chunk(2, dim=-1)  # [B, T, 2, N, H/2] each
        halves = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([torch.cat(halves, dim=-1), qkv[:, :, 2:]], dim=2)
    qkv = qkv.clone()
    first, second = qkv[:, :, :2].chunk(2, dim=-1)  # [B, T, 2, N, H/2] each
    rotated_first = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated_first)
    return qkv


class Dropout(nn.Module):
    """`nn.Dropout`, four times as fast on CPUs: every 64 random bits give four draws.

    There `p` is rounded to a multiple of 1/65,536. Compiled models use PyTorch's dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        """Show `p` where the model is printed."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero each element of `x` with probability `p`, divide the rest by 1 - p."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # which can't trace random_
            return F.dropout(x, self.p)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        bits.random_(-(2**63), None)  # without bounds the sign bit would never be set
        threshold = min(round(self.p * 2**16), 2**16 - 1)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - threshold))


def make_layer_norm(config: ModelConfig) -> nn.LayerNorm:
    """Make a LayerNorm over D; `modern` has no biases."""
    return nn.LayerNorm(config.hidden_size, eps=config.eps, bias=config.layout == "classic")


def make_linear(
    config: ModelConfig, size_in: int, size_out: int, *, residual: bool = False
) -> nn.Linear:
    """Make a dense layer; `modern` has no biases.

    `residual` marks layers that write to the residual stream. In `modern` the outputs of
    2 x num_layers of them add up, so their standard deviation is divided by the root of that.
    """
    dense = nn.Linear(size_in, size_out, bias=config.layout == "classic")
    scale = (2 * config.num_layers) ** -0.5 if residual and config.layout == "modern" else 1.0
    initialize(config, dense.weight, scale * config.initializer_range)
    if config.layout == "classic":
        nn.init.zeros_(dense.bias)
    return dense


def initialize(config: ModelConfig, weight: Tensor, std: float) -> None:
    """Draw random weights: normal, in `modern` truncated at two standard deviations."""
    if config.layout == "modern":
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=std)


class Embeddings(nn.Module):
    """Token embeddings with a LayerNorm; `classic` adds learned positions."""

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.hidden_size, padding_idx=pad_id)
        initialize(config, self.tokens.weight, config.initializer_range)
        with torch.no_grad():
            self.tokens.weight[pad_id].zero_()
        self.positions: nn.Parameter | None = None
        if config.layout == "classic":
            self.positions = nn.Parameter(torch.empty(config.max_seq_len, config.hidden_size))
            initialize(config, self.positions, config.initializer_range)
            # BERT's segment vector. Inputs are single texts, so there is one.
            self.token_type = nn.Parameter(torch.empty(1, config.hidden_size))
            initialize(config, self.token_type, config.initializer_range)
        self.norm = make_layer_norm(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed token ids, int64 [B, T] -> [B, T, D].

        `positions` are int64 [B or 1, T]; None: 0 .. T-1 in each row.
        """
        x: Tensor = self.tokens(input_ids)  # [B, T, D]
        if self.positions is not None:
            table = self.positions + self.token_type  # [max_seq_len, D]
            # A slice's gradient is a sum over B; a gather's is a scatter of B x T rows.
            x = x + (table[: input_ids.shape[1]] if positions is None else table[positions])
        x = self.dropout(self.norm(x))
        return x


class Attention(nn.Module):
    """Bidirectional multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = make_linear(config, config.hidden_size, 3 * config.hidden_size)
        self.out = make_linear(config, config.hidden_size, config.hidden_size, residual=True)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Attend as planned: `x` [B, T, D] -> [B, T, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, N, H]
        if plan.cos is not None and plan.sin is not None:
            qkv = apply_rotary(qkv, plan.cos, plan.sin)
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))  # [B, N, T, H] each
        mixed = attend(q, k, v, plan)  # [B, N, T, H]
        x = self.out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]
        return x


class FeedForward(nn.Module):
    """The position-wise network: GELU (`classic`) or GeGLU (`modern`, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.layout == "modern"
        size = config.feed_forward_size
        self.up = make_linear(config, config.hidden_size, 2 * size if self.gated else size)
        self.down = make_linear(config, size, config.hidden_size, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself: `x` [B, T, D] -> [B, T, D]."""
        x = self.up(x)  # [B, T, I], or [B, T, 2 I]: values, then gates
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = F.gelu(x) * gate  # [B, T, I]
        else:
            x = F.gelu(x)
        x = self.down(x)  # [B, T, D]
        return x


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with its residual connection and its LayerNorm."""

    recomputes = False  # whether the backward pass computes it again instead of keeping its values

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.pre_norm = config.layout == "modern"
        # ModernBERT's first layer reads the embeddings, which are already normalised.
        skip_norm = self.pre_norm and index == 0
        self.attention_norm: nn.Module = nn.Identity() if skip_norm else make_layer_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = make_layer_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Transform hidden states: `x` [B, T, D] -> [B, T, D]."""
        if self.recomputes and torch.is_grad_enabled():
            draws = self.training and self.dropout.p > 0
            y: Tensor = checkpoint(
                self._transform, x, plan, use_reentrant=False, preserve_rng_state=draws
            )
            return y
        return self._transform(x, plan)

    def _transform(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), plan))
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        else:
            x = self.attention_norm(x + self.dropout(self.attention(x, plan)))
            x = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return x
