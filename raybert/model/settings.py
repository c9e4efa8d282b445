"""The settings of the model: the encoder's architecture and the classification head."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raybert.config import Settings
from raybert.model.sizes import SizeName


class ModelConfig(Settings):
    """The encoder's architecture. The tokenizer decides the vocabulary and the special ids."""

    layout: Literal["modern", "classic"] = Field(
        "modern",
        description="modern: ModernBERT, the better one at equal cost; classic: BERT, for "
        "comparisons and for BERT's own weights",
    )
    size: SizeName | None = Field(
        None,
        description="decides width, layers and heads, and in pretrain and finetune learning rate "
        "and batches, where they are not set; null: their own defaults",
    )
    hidden_size: int = Field(256, gt=0, description="width; a multiple of num_heads")
    num_layers: int = Field(4, gt=0, description="encoder layers")
    num_heads: int = Field(
        4, gt=0, description="attention heads; BERT models of all sizes have 64 dimensions per head"
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
    initializer_range: float = Field(
        0.02, gt=0, description="standard deviation of randomly initialized weights"
    )
    norm_eps: float | None = Field(
        None, gt=0, description="added to variances; null: 1e-5 (modern), 1e-12 (classic)"
    )
    global_attention_every: int = Field(
        1,
        gt=0,
        description="modern: layers 0, n, 2n, ... attend to every token, the others to a window of "
        "local_attention; 1: all layers attend globally, the better choice up to a thousand tokens",
    )
    local_attention: int = Field(
        128, gt=1, description="modern: tokens in a local layer's window, half to either side"
    )
    global_rope_theta: float = Field(
        10_000.0, gt=0, description="modern: base of the rotary wavelengths in global layers"
    )
    local_rope_theta: float = Field(
        10_000.0, gt=0, description="modern: base of the rotary wavelengths in local layers"
    )

    @model_validator(mode="after")
    def _check_dimensions(self) -> ModelConfig:
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
        """Whether a layer attends to a window around each token instead of to all tokens."""
        return layer % self.global_attention_every != 0


class HeadConfig(Settings):
    """The classification head."""

    kind: Literal["standard", "keras"] = Field(
        "standard",
        description="standard: the layout's own head, which transformers loads; "
        "keras: the Keras example's (64 ReLU units)",
    )
    pooling: Literal["cls", "mean", "max"] | None = Field(
        None,
        description="how the hidden states of a text become one vector; null: mean (modern), "
        "cls (classic: BERT's, with its pooler), max (keras)",
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="dropout probability before the output layer"
    )

    def pooling_for(self, model: ModelConfig) -> Literal["cls", "mean", "max"]:
        """`pooling`, or the default of this head on the model's layout."""
        if self.pooling is not None:
            return self.pooling
        if self.kind == "keras":
            return "max"
        return "mean" if model.layout == "modern" else "cls"
