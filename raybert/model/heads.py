"""What stands on the encoder: the masked language model, and the classifier.

Both have the form of `transformers`' classes for the layout, so that their weights move both ways:
`modern` is ModernBertForMaskedLM and ModernBertForSequenceClassification, `classic` is
BertForMaskedLM and BertForSequenceClassification. `unsupported_by_transformers` names the rest.

Shapes: B batch, T tokens, D hidden, V vocabulary, M masked positions, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raybert.config import Settings
from raybert.model.attention import Dropout
from raybert.model.encoder import Encoder, ModelConfig
from raybert.model.losses import linear_cross_entropy

KERAS_HEAD_SIZE = 64  # the dense layer of the Keras example's classifier


class HeadConfig(Settings):
    """The classification head."""

    kind: Literal["standard", "keras"] = Field(
        "standard",
        description="standard: the layout's own head, which transformers loads; "
        "keras: the Keras example's (64 ReLU units)",
    )
    pooling: Literal["cls", "mean", "max"] | None = Field(
        None,
        description="how a text's hidden states become one; null: mean (modern), cls (classic: "
        "BERT's, with its pooler), max (keras)",
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="before the last layer; fine-tuning sees few texts often"
    )


class PredictionHead(nn.Module):
    """Dense, GELU, norm: between the encoder and the vocabulary or the labels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # ModernBERT starts this layer as small as those that write to the residual stream.
        self.dense = config.linear(config.hidden_size, config.hidden_size, residual=True)
        self.norm = config.layer_norm()

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [..., D]."""
        x = self.norm(F.gelu(self.dense(x)))
        return x


class MaskedLM(nn.Module):
    """The encoder with a head that predicts masked tokens; its last matrix is the embedding's."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = PredictionHead(encoder.config)
        self.bias = nn.Parameter(torch.zeros(encoder.vocab_size))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Same as `loss`: what DDP wraps is `forward`."""
        return self.loss(input_ids, labels, attention_mask, document_ids)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Sum the cross-entropy over the predicted tokens.

        The sum, not the mean: a step divides by the count of its global batch.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T]; negative where nothing is predicted.
            attention_mask: bool [B, T] or None, as in `Encoder.forward`.
            document_ids: int64 [B, T] or None, as in `Encoder.forward`.

        Returns:
            The sum in nats, a fp32 scalar, and the number of predicted tokens.
        """
        x = self.encoder(input_ids, attention_mask, document_ids)  # [B, T, D]
        labels = labels.flatten()  # [B T]
        positions = (labels >= 0).nonzero().squeeze(1)  # [M]
        x = self.head(x.flatten(0, 1).index_select(0, positions))  # [M, D]
        weight = self.encoder.embeddings.tokens.weight  # [V, D]
        total = linear_cross_entropy(x, weight, self.bias, labels.index_select(0, positions))
        return total, positions.numel()

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Score the vocabulary at some positions.

        Args:
            input_ids: int64 [B, T].
            attention_mask: bool [B, T] or None.
            positions: bool [B, T], or int64 [M] into the flattened batch.

        Returns:
            Logits, fp32 [M, V].
        """
        x = self.encoder(input_ids, attention_mask).flatten(0, 1)  # [B T, D]
        x = self.head(x[positions.flatten()])  # [M, D]
        weight = self.encoder.embeddings.tokens.weight  # [V, D]
        return F.linear(x, weight, self.bias).float()


class Classifier(nn.Module):
    """The encoder, a pooling over tokens, and a head that scores labels."""

    def __init__(self, encoder: Encoder, num_labels: int, config: HeadConfig | None = None) -> None:
        super().__init__()
        model = encoder.config
        self.encoder = encoder
        self.num_labels = num_labels
        self.config = config or HeadConfig()
        self.pooling = pooling_of(self.config, model)
        size = model.hidden_size
        self.transform: nn.Module
        if self.config.kind == "keras":
            dense = nn.Linear(size, KERAS_HEAD_SIZE)
            nn.init.xavier_uniform_(dense.weight)
            nn.init.zeros_(dense.bias)
            self.transform = nn.Sequential(dense, nn.ReLU())
            size = KERAS_HEAD_SIZE
        elif model.layout == "modern":
            self.transform = PredictionHead(model)
        else:
            self.transform = nn.Sequential(model.linear(size, size), nn.Tanh())
        self.dropout = Dropout(self.config.dropout)
        self.classifier = nn.Linear(size, num_labels)
        std = size**-0.5 if model.layout == "modern" else model.initializer_range
        model.initialize(self.classifier.weight, std)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Score the labels.

        Args:
            input_ids: int64 [B, T].
            attention_mask: bool [B, T], False at padding; None: no padding.
            lengths: tokens of each text, where they stand end to end in one row [1, T]: B is then
                the number of texts. None: a row is a text.

        Returns:
            Logits, fp32 [B, L].
        """
        x: Tensor = self.encoder(input_ids, attention_mask, lengths=lengths)  # [B, T, D]
        if lengths is None:
            x = pool(x, attention_mask, self.pooling)  # [B, D]
        else:
            texts = x[0].split_with_sizes(list(lengths))  # [T of each, D]
            x = torch.cat([pool(text[None], None, self.pooling) for text in texts])
        x = self.classifier(self.dropout(self.transform(x)))  # [B, L]
        return x.float()


def pool(x: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Reduce hidden states [B, T, D] over the tokens of `attention_mask` [B, T]: [B, D]."""
    if pooling == "cls":
        return x[:, 0]
    if attention_mask is None:
        return x.mean(dim=1) if pooling == "mean" else x.amax(dim=1)
    mask = attention_mask.bool()[..., None]  # [B, T, 1]
    if pooling == "mean":
        return (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).amax(dim=1)


def pooling_of(head: HeadConfig, model: ModelConfig) -> Literal["cls", "mean", "max"]:
    """Return `head.pooling`, or what stands for null."""
    if head.pooling is not None:
        return head.pooling
    if head.kind == "keras":
        return "max"
    return "mean" if model.layout == "modern" else "cls"


def unsupported_by_transformers(head: HeadConfig, model: ModelConfig) -> str | None:
    """Say why `transformers` can't load a classifier and which setting to change; None: it can."""
    if head.kind == "keras":
        return (
            "transformers has no head with 64 ReLU units, so only raybert loads this model; "
            "set head.kind=standard for one that transformers loads"
        )
    pooling = pooling_of(head, model)
    loadable = ("cls", "mean") if model.layout == "modern" else ("cls",)
    if pooling in loadable:
        return None
    return (
        f"transformers does not pool the {model.layout} layout by {pooling}, so only raybert loads "
        f"this model; set head.pooling={' or '.join(loadable)} for one that transformers loads"
    )
