"""LoRA (arXiv 2106.09685): an encoder's matrices stay, and a product of two small ones is learned.

A parametrization of PyTorch adds the product to a layer's weight, so that any layer is called as
before, of raybert's encoder or of transformers. Merged, the weight is a plain parameter again.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raybert.errors import ConfigError
from raybert.model.heads import Classifier
from raybert.model.layers import layer_number

M = TypeVar("M", bound=nn.Module)


class LowRank(nn.Module):
    """A weight [out, in] plus `up` [out, rank] times `down` [rank, in], scaled by alpha / rank."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))  # the model begins unchanged

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_lora(model: Classifier, rank: int, alpha: float) -> None:
    """Freeze a model's encoder, and add adapters to all matrices of its layers."""
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    matrices = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layer_number(name) is not None
    ]
    if not matrices:
        raise ConfigError(f"finetune.lora.rank={rank}: the encoder has no linear layers; use 0")
    for module in matrices:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha))


def merged(model: M) -> M:
    """A model whose adapters are added to its weights; itself where it has none."""
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return model
