"""Optimizers: their settings, a registry, parameter groups, and their state as named tensors.

A new optimizer is an entry in `OPTIMIZERS`, whose keys the configuration accepts; a setting of it
is a field of `OptimizerConfig`. `Mixed` gives parts of a model to different optimizers, by shapes
and names: `encoder.embeddings.*`, `encoder.layers.<n>.*`, `encoder.final_norm.*`, and those of the
head: `head.*` and `bias` in pretraining, `transform.*` and `classifier.*` in fine-tuning.

The rest of training relies on this:

- a group has `lr`, which `set_lr` sets before each step, `scale` and `param_names`;
- a step depends on `state` alone: for each parameter a dictionary of numbers and tensors, which
  `optimizer_tensors` stores by its keys;
- a step changes parameters in place, since the moving averages refer to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from raybert.config import KeyOf, Settings
from raybert.model.layers import layer_number

Groups = list[dict[str, Any]]  # `params` are pairs of a name and a parameter


def _adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _sgd(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    # A baseline, without momentum and thus without state.
    return torch.optim.SGD(groups, lr=config.lr)


def _muon(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon; its updates are scaled to the size of AdamW's, for which `lr` is chosen."""
    from raybert.train.muon import Muon  # PyTorch has it from 2.9 on

    matrices, rest = split_groups(
        groups, lambda name, parameter: layer_number(name) is not None and parameter.ndim == 2
    )
    muon = [Muon(matrices, adjust_lr_fn="match_rms_adamw")] if matrices else []
    return Mixed(*muon, _adamw(rest, config))


#: (parameter groups, settings) -> optimizer. Each group has its own `lr` and `weight_decay`.
OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "sgd": _sgd,
}

OptimizerName = Annotated[str, KeyOf(OPTIMIZERS)]


class OptimizerConfig(Settings):
    """The optimizer and its settings."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    optimizer: OptimizerName = Field(
        "adamw",
        description="adamw; muon: Muon (arXiv 2502.16982) for the matrices of the encoder's "
        "layers, AdamW for the rest; sgd: a baseline without momentum",
    )
    weight_decay: float = Field(0.01, ge=0, description="of matrices; never of biases and norms")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's decay rates")
    eps: float = Field(1e-6, gt=0, description="AdamW's epsilon")


class Mixed(torch.optim.Optimizer):
    """Several optimizers as one; ValueError if two of them have the same parameter."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state = self.state  # common to all of them

    def step(self, closure: Any = None) -> Any:
        """Take a step of each; a closure is not supported."""
        for part in self._parts:
            part.step()


def split_groups(
    groups: Groups, is_chosen: Callable[[str, nn.Parameter], bool]
) -> tuple[Groups, Groups]:
    """Split groups: the parameters that are chosen by name and shape, and the others."""
    parts: tuple[Groups, Groups] = ([], [])
    for group in groups:
        for part, wanted in zip(parts, (True, False), strict=True):
            members = [pair for pair in group["params"] if is_chosen(*pair) == wanted]
            if members:
                part.append({**group, "params": members})
    return parts


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """Build the configured optimizer over a model's parameters.

    Weight decay applies to matrices, not to vectors (biases, norms). `lr_scale` gives the factor of
    the learning rate for a parameter's name, for layer-wise decay.
    """
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((parameter.ndim >= 2, lr_scale(name)), []).append((name, parameter))
    optimizer = OPTIMIZERS[config.optimizer](
        [
            {
                "params": members,
                "weight_decay": config.weight_decay if decays else 0.0,
                "scale": scale,
                "lr": config.lr * scale,
            }
            for (decays, scale), members in groups.items()
        ],
        config,
    )
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `<parameter>|<key of its state>`."""
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = torch.as_tensor(value)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the optimizer's state by what `optimizer_tensors` returned."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name_and_key, tensor in tensors.items():
        name, _, key = name_and_key.rpartition("|")
        states.setdefault(name, {})[key] = tensor
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            optimizer.state.pop(parameter, None)
            if name in states:
                # AdamW's fused kernel needs its step counter in fp32 on the parameter's device.
                optimizer.state[parameter] = {
                    key: tensor.to(parameter.device) for key, tensor in states[name].items()
                }
