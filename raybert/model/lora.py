"""LoRA (arXiv 2106.09685): an encoder's matrices stay, and products of two small ones are learned.

A layer with an adapter is a linear layer with two more parameters, so that it takes the place of
any linear layer, of raybert's encoder or of transformers'. Merged, it is a plain one again.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.errors import ConfigError
from raybert.model.heads import Classifier
from raybert.model.layers import layer_number

M = TypeVar("M", bound=nn.Module)


class LoraLinear(nn.Linear):
    """A linear layer plus `up` [out, rank] times `down` [rank, in], scaled by alpha / rank."""

    def __init__(self, plain: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # the parameters are those of `plain`
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.scale = alpha / rank
        self.down = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(self.weight.new_zeros(self.out_features, rank))  # changes nothing

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in] to [..., out]."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = torch.addmm(self.weight, self.up, self.down, alpha=self.scale)
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain


def add_lora(model: Classifier, rank: int, alpha: float) -> None:
    """Freeze a model's encoder, and give adapters to all linear layers in its layers."""
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    plain = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layer_number(name) is not None
    }
    if not plain:
        raise ConfigError(f"finetune.lora.rank={rank}: the encoder has no linear layers; use 0")
    for name, module in plain.items():
        model.set_submodule(name, LoraLinear(module, rank, alpha))


def merged(model: M) -> M:
    """A model whose adapters are added to its weights; itself where it has none."""
    if not any(isinstance(module, LoraLinear) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.merged())
    return model
