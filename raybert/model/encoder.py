"""The encoder: token ids to hidden states, in the `modern` and the `classic` layout (`layers`).

Shapes: B batch, T tokens, D hidden, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raybert.errors import ConfigError
from raybert.model.attention import has_varlen_kernel
from raybert.model.attention_plan import (
    AttentionPlan,
    concatenated_positions,
    cumulative_lengths,
    document_positions,
    local_mask,
    rotation,
    text_numbers,
    visibility_mask,
    window_mask,
    window_queries,
)
from raybert.model.layers import Embeddings, EncoderLayer, make_layer_norm, rotary_angles
from raybert.model.settings import ModelConfig


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
            self.final_norm = make_layer_norm(config)
            angles = rotary_angles(config, config.global_rope_theta)  # [max_seq_len, H/2]
            self.register_buffer("global_angles", angles, persistent=False)
            angles = rotary_angles(config, config.local_rope_theta)
            self.register_buffer("local_angles", angles, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Encode a batch to hidden states [B, T, D], which are undefined at padding.

        Args:
            input_ids: int64 [B, T].
            attention_mask: bool [B, T], False at padding; None: no padding, the fast path, since
                attention then runs without a mask.
            document_ids: int64 [B, T], the number of the packed document, from 0: tokens attend to
                their own document only, and its positions start at 0. None: a row is one document.
            lengths: tokens of each text where B is 1 and texts are concatenated in the row, which
                may then have any length: inference without padding. None: a row is one text.
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
        """Compute what `transform` needs besides the token ids; arguments as in `forward`.

        Returns positions, int64 [B or 1, T], or None where each row counts from 0, and the plans of
        the global and of the local layers.
        """
        seq_len = input_ids.shape[1] if lengths is None else max(lengths)
        if seq_len > self.config.max_seq_len:
            raise ConfigError(
                f"a row of {seq_len} tokens is longer than max_seq_len={self.config.max_seq_len}; "
                f"shorten it, or train a model with max_seq_len={seq_len}"
            )
        positions = None
        if lengths is not None:
            positions = concatenated_positions(lengths, input_ids.device)
        elif document_ids is not None:
            positions = document_positions(document_ids)
        cos, sin = self._rotation("global_angles", positions, seq_len)
        plan = AttentionPlan(None, cos, sin, lengths)
        if lengths is not None and self.has_varlen_kernel(input_ids.device):
            plan = plan._replace(
                lengths=None,
                cu_seqlens=cumulative_lengths(lengths, input_ids.device),
                longest=1 << (seq_len - 1).bit_length(),  # a compiled kernel may depend on it
            )
        elif lengths is None:
            plan = plan._replace(mask=visibility_mask(attention_mask, document_ids))
        if self.config.global_attention_every == 1:
            return positions, plan, plan
        cos, sin = self._rotation("local_angles", positions, seq_len)
        half = self.config.local_attention // 2
        local = plan._replace(cos=cos, sin=sin, half_window=half)
        if lengths is None and seq_len > half + 1:
            queries = window_queries(seq_len, half)
            if queries:
                texts = text_numbers(input_ids, attention_mask, document_ids)
                local = local._replace(mask=None, windows=window_mask(texts, half, queries))
            else:
                near = local_mask(seq_len, half, input_ids.device)
                local = local._replace(mask=near if plan.mask is None else plan.mask & near)
        return positions, plan, local

    @property
    def embedding_norm(self) -> nn.Module:
        """The module whose outputs are the normalized embeddings."""
        return self.embeddings.norm

    def has_varlen_kernel(self, device: torch.device) -> bool:
        """Whether one kernel attends to texts of any lengths in a row: then no mask is needed."""
        if device.type != "cuda":
            return False
        dtype = next(self.parameters()).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return has_varlen_kernel(device, dtype, self.config.head_dim)

    def transform(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        global_plan: AttentionPlan,
        local_plan: AttentionPlan,
    ) -> Tensor:
        """Encode `input_ids` int64 [B, T] with the results of `plan`: hidden states [B, T, D]."""
        x: Tensor = self.embeddings(input_ids, positions)  # [B, T, D]
        for index, layer in enumerate(self.layers):
            x = layer(x, local_plan if self.config.is_local(index) else global_plan)
        x = self.final_norm(x)
        return x

    def _rotation(
        self, name: str, positions: Tensor | None, seq_len: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Cosines and sines of a row's or of all rows' rotary angles; `classic` has none."""
        if self.config.layout == "classic":
            return None, None
        angles = self.get_buffer(name)  # [max_seq_len, H/2]
        return rotation(angles[:seq_len] if positions is None else angles[positions])


class TracedEncoder(nn.Module):
    """The encoder without branches on the number of tokens, which a graph can't have."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """As `Encoder.forward`; the mask of local layers is computed for any number of tokens."""
        encoder, seq_len = self.encoder, input_ids.shape[1]
        config = encoder.config
        mask = visibility_mask(attention_mask, None)
        plan = AttentionPlan(mask, *self._rotation("global_angles", seq_len))
        local_plan = plan
        if config.global_attention_every > 1:
            near = local_mask(seq_len, config.local_attention // 2, input_ids.device)
            mask = near if mask is None else mask & near
            local_plan = AttentionPlan(mask, *self._rotation("local_angles", seq_len))
        return encoder.transform(input_ids, None, plan, local_plan)

    def _rotation(self, name: str, seq_len: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if self.encoder.config.layout == "classic":
            return None, None
        return rotation(self.encoder.get_buffer(name)[:seq_len])
