"""The heads on the encoder: masked language model and classifier.

Both are the layout's classes in `transformers`, ModernBertFor... or BertFor..., so that weights
convert both ways; `huggingface.unsupported_by_transformers` names the exceptions.

Shapes: B batch, T tokens, D hidden, V vocabulary, M masked positions, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.model.encoder import Encoder, TracedEncoder
from raybert.model.layers import Dropout, initialize, make_layer_norm, make_linear
from raybert.model.losses import linear_cross_entropy
from raybert.model.settings import HeadConfig, ModelConfig

KERAS_HEAD_SIZE = 64  # the dense layer of the Keras example's classifier


class PredictionHead(nn.Module):
    """Dense, GELU, LayerNorm: between the encoder and the vocabulary or the labels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # ModernBERT initialises this layer like those that write to the residual stream.
        self.dense = make_linear(config, config.hidden_size, config.hidden_size, residual=True)
        self.norm = make_layer_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [..., D] -> [..., D]."""
        x = self.norm(F.gelu(self.dense(x)))
        return x


class MaskedLM(nn.Module):
    """The encoder with a head that predicts masked tokens; the output matrix is the embedding."""

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
        lengths: Sequence[int] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Sum the cross-entropy over the predicted tokens; a step divides by its global count.

        `labels` are int64 [B, T], negative where nothing is predicted; or, of the `positions` int64
        [M] into the flattened batch only, int64 [M]: a GPU then waits for nobody to find them. The
        other arguments are as in `Encoder.forward`. Returns the sum in nats, an fp32 scalar, and
        the number of positions.
        """
        x = self.encoder(input_ids, attention_mask, document_ids, lengths)  # [B, T, D]
        if positions is None:
            labels = labels.flatten()  # [B T]
            positions = (labels >= 0).nonzero().squeeze(1)  # [M]
            labels = labels.index_select(0, positions)
        x = self.head(x.flatten(0, 1).index_select(0, positions))  # [M, D]
        weight = self.encoder.embeddings.tokens.weight  # [V, D]
        return linear_cross_entropy(x, weight, self.bias, labels), positions.numel()

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Compute the logits of the vocabulary, fp32 [M, V], for input ids int64 [B, T].

        `positions` are bool [B, T], or int64 [M] into the flattened batch.
        """
        x = self.encoder(input_ids, attention_mask).flatten(0, 1)  # [B T, D]
        x = self.head(x[positions.flatten()])  # [M, D]
        weight = self.encoder.embeddings.tokens.weight  # [V, D]
        return F.linear(x, weight, self.bias).float()


class Classifier(nn.Module):
    """The encoder, pooling over tokens unless each of them is classified, and a head."""

    def __init__(
        self,
        encoder: Encoder,
        num_labels: int,
        config: HeadConfig | None = None,
        *,
        per_token: bool = False,
    ) -> None:
        super().__init__()
        model = encoder.config
        self.encoder = encoder
        self.num_labels = num_labels
        self.config = config or HeadConfig()
        self.per_token = per_token
        self.pooling = "none" if per_token else self.config.pooling_for(model)
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
        elif per_token:  # BERT's pooler belongs to the first token
            self.transform = nn.Identity()
        else:
            self.transform = nn.Sequential(make_linear(model, size, size), nn.Tanh())
        self.dropout = Dropout(self.config.dropout)
        self.classifier = nn.Linear(size, num_labels)
        std = size**-0.5 if model.layout == "modern" else model.initializer_range
        initialize(model, self.classifier.weight, std)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Compute the logits of the labels, fp32 [B, L], for `input_ids` int64 [B, T].

        Where each token is classified, they are [B, T, L].

        `attention_mask` is bool [B, T], False at padding; None: no padding. `lengths` are the
        tokens of B texts that are concatenated in one row, `input_ids` [1, T].
        """
        x: Tensor = self.encoder(input_ids, attention_mask, lengths=lengths)  # [B, T, D]
        if self.per_token:
            pass
        elif lengths is None:
            x = pool(x, attention_mask, self.pooling)  # [B, D]
        else:
            texts = x[0].split_with_sizes(list(lengths))  # [T of each, D]
            x = torch.cat([pool(text[None], None, self.pooling) for text in texts])  # [B, D]
        x = self.classifier(self.dropout(self.transform(x)))  # [B, L]
        return x.float()

    def make_traceable(self) -> None:
        """Make the model, in place, one that `torch.export` traces for any number of tokens."""
        self.encoder = TracedEncoder(self.encoder)  # type: ignore[assignment]


def pool(x: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Pool hidden states over the tokens of each text by cls, mean or max: [B, T, D] -> [B, D]."""
    if pooling == "cls":
        return x[:, 0]
    if attention_mask is None:
        return x.mean(dim=1) if pooling == "mean" else x.amax(dim=1)
    mask = attention_mask.bool()[..., None]  # [B, T, 1]
    if pooling == "mean":
        return (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).amax(dim=1)
