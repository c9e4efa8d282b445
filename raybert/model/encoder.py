"""The encoder, in two layouts that `transformers` knows.

`modern` is ModernBERT (arXiv 2412.13663, section 2.1): normalised before each sublayer, rotary
positions, GeGLU, no biases. `classic` is BERT (arXiv 1810.04805): normalised after each sublayer,
learned positions, GELU, biases. The names here are our own; `hub` maps them to the two layouts.

Shapes: B batch, T tokens, D hidden, N heads, H head dim, I intermediate, V vocabulary,
M masked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from raybert.config import Settings
from raybert.errors import ConfigError
from raybert.model.attention import Dropout, attend, attend_between, attend_each


class ModelConfig(Settings):
    """The encoder's shape. What the tokenizer decides (vocabulary, special ids) is not in it."""

    layout: Literal["modern", "classic"] = Field(
        "modern",
        description="modern: ModernBERT, the better one at equal cost; classic: BERT, for "
        "comparisons and for BERT's own weights",
    )
    hidden_size: int = Field(256, gt=0, description="width; a multiple of num_heads")
    num_layers: int = Field(4, gt=0, description="encoder layers")
    num_heads: int = Field(
        4, gt=0, description="attention heads; 64 dimensions each is what BERTs of all sizes have"
    )
    intermediate_size: int | None = Field(
        None,
        gt=0,
        description="width inside the feed-forward; null: 4 x hidden_size (classic), or 8/3 of it "
        "to the nearest 64 (modern: GeGLU has three matrices, so the parameters are as many)",
    )
    max_seq_len: int = Field(512, gt=0, description="longest input in tokens")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="after the embeddings and each sublayer; 0: in pretraining on a fixed budget "
        "it only slows learning (arXiv 2212.14034, section 4.3)",
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of fresh weights")
    norm_eps: float | None = Field(
        None, gt=0, description="added to variances; null: 1e-5 (modern), 1e-12 (classic)"
    )
    global_attention_every: int = Field(
        1,
        gt=0,
        description="modern: layers 0, n, 2n, ... see every token, the others local_attention; "
        "1: all see all, the better choice up to a thousand tokens",
    )
    local_attention: int = Field(
        128, gt=1, description="modern: tokens in a local layer's window, half to either side"
    )
    global_rope_theta: float = Field(
        10_000.0, gt=0, description="modern: base of the rotary wavelengths where all is seen"
    )
    local_rope_theta: float = Field(10_000.0, gt=0, description="modern: the same, local layers")

    @model_validator(mode="after")
    def _shape(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            below = self.hidden_size // self.num_heads * self.num_heads
            near = [str(size) for size in (below, below + self.num_heads) if size]
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                f"use hidden_size={' or '.join(near)}"
            )
        if self.layout == "modern" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_heads={self.num_heads} makes heads of "
                f"{self.head_dim} dimensions, and rotary positions need an even number; "
                f"use hidden_size={self.hidden_size + self.num_heads} or layout=classic"
            )
        if self.layout == "classic" and self.global_attention_every > 1:
            raise ValueError(
                f"global_attention_every={self.global_attention_every} needs layout=modern; "
                "use 1 with layout=classic"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def feed_forward_size(self) -> int:
        """`intermediate_size`, or the layout's default."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.layout == "classic":
            return 4 * self.hidden_size
        return max(1, round(self.hidden_size / 24)) * 64

    @property
    def eps(self) -> float:
        """`norm_eps`, or the layout's default."""
        if self.norm_eps is not None:
            return self.norm_eps
        return 1e-5 if self.layout == "modern" else 1e-12

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees its neighbourhood only."""
        return layer % self.global_attention_every != 0

    def layer_norm(self) -> nn.LayerNorm:
        """Make a norm as the layout has it: `modern` has no biases."""
        return nn.LayerNorm(self.hidden_size, eps=self.eps, bias=self.layout == "classic")

    def linear(self, size_in: int, size_out: int, *, residual: bool = False) -> nn.Linear:
        """Make a dense layer as the layout has it.

        `residual` marks those that write to the residual stream. In `modern`, 2 x num_layers of
        them add up, so they start smaller by the root of that.
        """
        dense = nn.Linear(size_in, size_out, bias=self.layout == "classic")
        scale = (2 * self.num_layers) ** -0.5 if residual and self.layout == "modern" else 1.0
        self.initialize(dense.weight, scale * self.initializer_range)
        if self.layout == "classic":
            nn.init.zeros_(dense.bias)
        return dense

    def initialize(self, weight: Tensor, std: float) -> None:
        """Draw fresh weights: normal, and in `modern` nothing past two standard deviations."""
        if self.layout == "modern":
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.normal_(weight, std=std)


class AttentionPlan(NamedTuple):
    """What attention needs besides the hidden states; one for all layers of a kind."""

    mask: Tensor | None  # bool [B or 1, 1, T or 1, T], True: may be seen; None: everything may
    cos: Tensor | None  # fp32 [B or 1, T, 1, 1, H/2]; None: no rotary positions
    sin: Tensor | None
    # Of texts end to end in one row; then no mask is needed. A tensor: their bounds, int64 [n + 1].
    lengths: Sequence[int] | Tensor | None = None
    reach: int | None = None  # of a local layer, where there are lengths


class Embeddings(nn.Module):
    """Token ids to vectors, normalised; `classic` adds learned positions."""

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.hidden_size, padding_idx=pad_id)
        config.initialize(self.tokens.weight, config.initializer_range)
        with torch.no_grad():
            self.tokens.weight[pad_id].zero_()
        self.positions: nn.Parameter | None = None
        if config.layout == "classic":
            self.positions = nn.Parameter(torch.empty(config.max_seq_len, config.hidden_size))
            config.initialize(self.positions, config.initializer_range)
            # BERT's segment vector. Inputs are single texts, so there is one.
            self.token_type = nn.Parameter(torch.empty(1, config.hidden_size))
            config.initialize(self.token_type, config.initializer_range)
        self.norm = config.layer_norm()
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """Embed `input_ids` [B, T]; `positions` [B, T] are 0 .. T-1 where they are None."""
        x: Tensor = self.tokens(input_ids)  # [B, T, D]
        if self.positions is not None:
            table = self.positions + self.token_type  # [max_seq_len, D]
            # A slice's gradient is a sum over B; a gather's is a scatter of B x T rows.
            x = x + (table[: input_ids.shape[1]] if positions is None else table[positions])
        x = self.dropout(self.norm(x))
        return x


class Attention(nn.Module):
    """Self-attention over all heads, in both directions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = config.linear(config.hidden_size, 3 * config.hidden_size)
        self.out = config.linear(config.hidden_size, config.hidden_size, residual=True)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Mix `x` [B, T, D] over the tokens that `plan.mask` lets each one see."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, N, H]
        if plan.cos is not None and plan.sin is not None:
            # In qkv's dtype, as transformers has it: mixed dtypes would cost as much again.
            rotate = _Rotary.apply if qkv.requires_grad else _rotated
            qkv = rotate(qkv, plan.cos.to(qkv.dtype), plan.sin.to(qkv.dtype))
        q, k, v = qkv.unbind(2)  # [B, T, N, H] each
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [B, N, T, H]
        if plan.lengths is None:
            mixed = attend(q, k, v, plan.mask)  # [B, N, T, H]
        elif isinstance(plan.lengths, Tensor):
            mixed = attend_between(q, k, v, plan.lengths, plan.reach)
        else:
            mixed = attend_each(q, k, v, plan.lengths, plan.reach)
        x = self.out(mixed.transpose(1, 2).flatten(2))  # [B, T, D]
        return x


class FeedForward(nn.Module):
    """The position-wise network: GELU (`classic`) or GeGLU (`modern`, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.layout == "modern"
        size = config.feed_forward_size
        self.up = config.linear(config.hidden_size, 2 * size if self.gated else size)
        self.down = config.linear(size, config.hidden_size, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [B, T, D], each token by itself."""
        x = self.up(x)  # [B, T, I], or [B, T, 2 I] with the gates behind
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = F.gelu(x) * gate  # [B, T, I]
        else:
            x = F.gelu(x)
        x = self.down(x)  # [B, T, D]
        return x


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with its residual and its norm."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.pre_norm = config.layout == "modern"
        # ModernBERT's first layer reads the embeddings, which were normalised one line before.
        skip = self.pre_norm and index == 0
        self.attention_norm: nn.Module = nn.Identity() if skip else config.layer_norm()
        self.attention = Attention(config)
        self.feed_forward_norm = config.layer_norm()
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """Transform `x` [B, T, D]."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), plan))
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        else:
            x = self.attention_norm(x + self.dropout(self.attention(x, plan)))
            x = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return x


class Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int = 0) -> None:
        super().__init__()
        if not 0 <= pad_id < vocab_size:
            raise ConfigError(f"pad_id={pad_id} is outside the vocabulary of {vocab_size} tokens")
        self.config = config
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.embeddings = Embeddings(config, vocab_size, pad_id)
        self.layers = nn.ModuleList(
            EncoderLayer(config, index) for index in range(config.num_layers)
        )
        self.final_norm: nn.Module = nn.Identity()
        if config.layout == "modern":
            self.final_norm = config.layer_norm()
            angles = _rotary_angles(config, config.global_rope_theta)  # [max_seq_len, H/2]
            self.register_buffer("global_angles", angles, persistent=False)
            angles = _rotary_angles(config, config.local_rope_theta)
            self.register_buffer("local_angles", angles, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Encode a batch.

        Args:
            input_ids: int64 [B, T].
            attention_mask: bool [B, T], False at padding; None: no padding, the fast path, since
                attention then runs without a mask.
            document_ids: int64 [B, T], 0 and up, a number for each packed document: tokens see
                their own document only, and its positions start at 0. None: a row is one document.
            lengths: tokens of each text where B is 1 and texts stand end to end in the row, which
                may then be of any length: the way to answer without padding. None: they don't.

        Returns:
            Hidden states [B, T, D]. Those at padding mean nothing.

        Raises:
            ConfigError: a text is longer than max_seq_len.
        """
        plans = self.plan(input_ids, attention_mask, document_ids, lengths)
        return self.transform(input_ids, *plans)

    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor | None, AttentionPlan, AttentionPlan]:
        """What `transform` needs of a batch, described as in `forward`.

        Returns:
            Positions [B, T], or None where each row begins at 0; what global layers need; and what
            local ones do.

        Raises:
            ConfigError: a text is longer than max_seq_len.
        """
        seq_len = input_ids.shape[1] if lengths is None else max(lengths)
        if seq_len > self.config.max_seq_len:
            raise ConfigError(
                f"a row of {seq_len} tokens is longer than max_seq_len={self.config.max_seq_len}; "
                f"shorten it, or train a model with max_seq_len={seq_len}"
            )
        positions = None if document_ids is None else _positions(document_ids)  # [B, T]
        if lengths is not None:
            starts = torch.arange(seq_len, device=input_ids.device)
            positions = torch.cat([starts[:length] for length in lengths])[None]  # [1, T]
        mask = _mask(attention_mask, document_ids)
        global_plan = self._plan(mask, positions, seq_len, lengths, local=False)
        local_plan = global_plan
        if self.config.global_attention_every > 1:
            local_plan = self._plan(mask, positions, seq_len, lengths, local=True)
        return positions, global_plan, local_plan

    def transform(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        global_plan: AttentionPlan,
        local_plan: AttentionPlan,
    ) -> Tensor:
        """Encode `input_ids` [B, T] by what `plan` made of the batch: hidden states [B, T, D]."""
        x: Tensor = self.embeddings(input_ids, positions)  # [B, T, D]
        for index, layer in enumerate(self.layers):
            x = layer(x, local_plan if self.config.is_local(index) else global_plan)
        x = self.final_norm(x)
        return x

    def _plan(
        self,
        mask: Tensor | None,
        positions: Tensor | None,
        seq_len: int,
        lengths: Sequence[int] | None,
        *,
        local: bool,
    ) -> AttentionPlan:
        if self.config.layout == "classic":
            return AttentionPlan(mask, None, None, lengths)
        angles = self.get_buffer("local_angles" if local else "global_angles")
        # [T, H/2], or [B, T, H/2] by document; then broadcast over query and key, and heads
        angles = angles[:seq_len] if positions is None else angles[positions]
        angles = angles[..., None, None, :]
        reach = self.config.local_attention // 2
        if lengths is not None:
            return AttentionPlan(
                mask, angles.cos(), angles.sin(), lengths, reach if local else None
            )
        if local and seq_len > reach + 1:
            at = torch.arange(seq_len, device=angles.device)
            near = ((at[:, None] - at).abs() <= reach)[None, None]  # [1, 1, T, T]
            mask = near if mask is None else mask & near
        return AttentionPlan(mask, angles.cos(), angles.sin())


def num_parameters(model: nn.Module) -> int:
    """Count a model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(
    config: ModelConfig, seq_len: int, vocab_size: int = 0, masked_fraction: float = 0.0
) -> float:
    """Floating-point operations of training on one token, forward and backward, for MFU.

    A matrix product costs 2 a weight and token, and its backward twice as much: 6 in all. Attention
    adds two products of T x H a head and token: 4 T D a layer forward, 12 with backward (PaLM,
    arXiv 2204.02311, appendix B, without its causal half). Masked positions alone pay for the
    prediction head, D^2 + D V weights. Embedding look-ups, norms and activations count as nothing.
    """
    hidden, feed_forward = config.hidden_size, config.feed_forward_size
    matrices = 3 if config.layout == "modern" else 2
    layer = 4 * hidden**2 + matrices * hidden * feed_forward
    attention = 2 * min(seq_len, config.max_seq_len) * hidden
    head = masked_fraction * (hidden**2 + hidden * vocab_size) if vocab_size else 0.0
    return 6.0 * (config.num_layers * (layer + attention) + head)


def _rotary_angles(config: ModelConfig, theta: float) -> Tensor:
    """Position times frequency, fp32 [max_seq_len, H/2] (arXiv 2104.09864, equation 15)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # [H/2]
    return torch.outer(torch.arange(config.max_seq_len).float(), 1.0 / theta**exponents)


class _Rotary(torch.autograd.Function):
    """Rotate queries and keys; written out, for autograd's own way takes twice as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(qkv, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of the queries and keys in [B, T, 3, N, H], not the values."""
    if torch.compiler.is_compiling():  # which turns writing in place into masks for every element
        first, second = qkv[:, :, :2].chunk(2, dim=-1)  # [B, T, 2, N, H/2] each
        halves = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([torch.cat(halves, dim=-1), qkv[:, :, 2:]], dim=2)
    qkv = qkv.clone()
    first, second = qkv[:, :, :2].chunk(2, dim=-1)  # [B, T, 2, N, H/2] each
    turned = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return qkv


def _positions(document_ids: Tensor) -> Tensor:
    """Count from 0 in each document: int64 [B, T]."""
    at = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return at - (at * starts).cummax(dim=1).values


def _mask(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Which token may see which: bool, broadcastable to [B, 1, T, T]; None: all see all."""
    if document_ids is None:
        return None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if attention_mask is not None:
        # Padding becomes a document: a token that sees nothing at all would come out as NaN.
        document_ids = document_ids.masked_fill(~attention_mask.bool(), -1)
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]  # [B, 1, T, T]
