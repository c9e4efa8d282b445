"""A classifier of transformers, called and saved as one of raybert's own.

It has the head of its architecture in `transformers`, so that its directory is one that
`transformers` reads and writes.

Shapes: B batch, T tokens, L labels.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from raybert.errors import UserError
from raybert.model.heads import Classifier
from raybert.model.huggingface.config_json import FORMAT_VERSION
from raybert.model.settings import HeadConfig, ModelConfig


@dataclass(frozen=True)
class TransformersEncoder:
    """The encoder in a model of transformers, with what is asked of `model.encoder.Encoder`."""

    config: ModelConfig  # its sizes
    vocab_size: int
    pad_id: int
    base: Any

    @property
    def embeddings(self) -> nn.Module:
        """Token ids to the first layer's input."""
        found: nn.Module = getattr(self.base, "embeddings", self.base.get_input_embeddings())
        return found

    @property
    def embedding_norm(self) -> nn.Module:
        """The module whose outputs are the normalized embeddings."""
        found: nn.Module = getattr(self.embeddings, "LayerNorm", self.embeddings)
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """The encoder's parameters."""
        yield from self.base.parameters()


class TransformersClassifier(Classifier):
    """A classifier of transformers with its own head."""

    def __init__(
        self, model: Any, shape: ModelConfig, head: HeadConfig, *, per_token: bool
    ) -> None:
        nn.Module.__init__(self)  # the modules are those of `model`
        self.model = model
        self.num_labels = int(model.config.num_labels)
        self.config, self.per_token, self._shape = head, per_token, shape

    @property
    def encoder(self) -> Any:  # type: ignore[override]
        """The encoder, a `TransformersEncoder`."""
        config = self.model.config
        pad_id = config.pad_token_id or 0
        return TransformersEncoder(self._shape, config.vocab_size, pad_id, self.model.base_model)

    @property
    def classifier(self) -> Any:  # type: ignore[override]
        """The output layer."""
        return self.model.get_submodule(_output_layer(self.model))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Compute the logits of the labels, as `Classifier.forward`."""
        if lengths is not None:
            texts = list(input_ids[0].split_with_sizes(list(lengths)))
            padded = pad_sequence(texts, batch_first=True, padding_value=self.encoder.pad_id)
            columns = torch.arange(padded.shape[1], device=padded.device)
            mask = columns < torch.tensor(lengths, device=padded.device)[:, None]
            logits: Tensor = self(padded, mask)
            if not self.per_token:
                return logits
            rows = [row[:length] for row, length in zip(logits, lengths, strict=True)]
            return torch.cat(rows)[None]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask.long())
        x: Tensor = outputs.logits
        return x.float()

    def make_traceable(self) -> None:
        """Do nothing: transformers' models can be traced."""

    def in_bf16(self) -> TransformersClassifier:
        """A copy with weights in bf16; buffers, which hold positions, stay as they are."""
        copied = copy.deepcopy(self)
        for parameter in copied.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return copied

    def config_json(self, preprocessing: Mapping[str, Any] | None) -> dict[str, Any]:
        """The `config.json` that transformers writes, with raybert's section."""
        values: dict[str, Any] = json.loads(self.model.config.to_json_string())
        section = {"format_version": FORMAT_VERSION, "preprocessing": dict(preprocessing or {})}
        own = {"architectures": [type(self.model).__name__], "dtype": "float32"}
        return {**values, **own, "raybert": section}

    def tensors(self, temperature: float) -> dict[str, Tensor]:
        """The weights by transformers' names; `temperature` divides the logits."""
        output = _output_layer(self.model) + "."
        return {
            name: tensor / temperature if name.startswith(output) else tensor
            for name, tensor in self.model.state_dict().items()
        }


def _output_layer(model: Any) -> str:
    """The name of the layer whose outputs are the logits."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
        if not name.startswith(f"{model.base_model_prefix}.")
    ]
    if not names:
        raise UserError(
            f"{type(model).__name__} has no linear output layer, so raybert can't use it"
        )
    return str(names[-1])
