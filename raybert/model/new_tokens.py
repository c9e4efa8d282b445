"""Embeddings of tokens that a pretrained model does not know: the mean of their pieces'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from raybert.model.heads import MaskedLM


@torch.no_grad()
def add_tokens(model: MaskedLM, pieces: Mapping[int, Sequence[int]]) -> None:
    """Add tokens to a model, in place: the ids of each new one's pieces, by its id."""
    encoder, tokens = model.encoder, model.encoder.embeddings.tokens
    known, size = encoder.vocab_size, max([encoder.vocab_size - 1, *pieces]) + 1
    weight, bias = tokens.weight.new_zeros(size, tokens.embedding_dim), model.bias.new_zeros(size)
    weight[:known], bias[:known] = tokens.weight, model.bias
    for index, parts in pieces.items():
        weight[index] = tokens.weight[list(parts)].mean(dim=0)
        bias[index] = model.bias[list(parts)].mean()
    encoder.embeddings.tokens = nn.Embedding(
        size, tokens.embedding_dim, padding_idx=encoder.pad_id, _weight=weight
    )
    model.bias = nn.Parameter(bias)
    encoder.vocab_size = size
