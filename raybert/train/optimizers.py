"""Optimizers: a registry, the parameter groups they get, and their state as named tensors.

A new optimizer is an entry in `OPTIMIZERS`, whose keys are what the configuration accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

Groups = list[dict[str, Any]]


class _Settings(Protocol):
    """What optimizers read of the settings of a run."""

    @property
    def optimizer(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def _adamw(groups: Groups, config: _Settings) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _sgd(groups: Groups, config: _Settings) -> torch.optim.Optimizer:
    """Plain SGD: a baseline, without momentum and thus without state."""
    return torch.optim.SGD(groups, lr=config.lr)


#: (parameter groups, settings) -> optimizer. Each group has its own `lr` and `weight_decay`.
OPTIMIZERS: dict[str, Callable[[Groups, _Settings], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


def make_optimizer(
    model: nn.Module,
    config: _Settings,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """Build the configured optimizer over a model's parameters.

    Weight decay applies to matrices, not to vectors (biases, norms).

    Args:
        model: the model.
        config: the optimizer's settings.
        lr_scale: gives the factor of the learning rate for a parameter's name, for layer-wise
            decay.
    """
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((parameter.ndim >= 2, lr_scale(name)), []).append((name, parameter))
    return OPTIMIZERS[config.optimizer](
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
