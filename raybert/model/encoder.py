"""The encoder: token ids to hidden states, in the `modern` and the `classic` layout (`layers`).

Shapes: B batch, T tokens, D hidden, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raybert.errors import ConfigError
from raybert.model.attention import (
    AttentionPlan,
    concatenated_positions,
    document_positions,
    plan_attention,
    visibility_mask,
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
        mask = visibility_mask(attention_mask, document_ids)
        angles = self._angles("global_angles", positions, seq_len)
        global_plan = plan_attention(mask, angles, seq_len, lengths, None)
        local_plan = global_plan
        if self.config.global_attention_every > 1:
            angles = self._angles("local_angles", positions, seq_len)
            half_window = self.config.local_attention // 2
            local_plan = plan_attention(mask, angles, seq_len, lengths, half_window)
        return positions, global_plan, local_plan

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

    def _angles(self, name: str, positions: Tensor | None, seq_len: int) -> Tensor | None:
        """Rotary angles, fp32 [T, H/2], or [B or 1, T, H/2] by position; `classic` has none."""
        if self.config.layout == "classic":
            return None
        angles = self.get_buffer(name)  # [max_seq_len, H/2]
        return angles[:seq_len] if positions is None else angles[positions]
