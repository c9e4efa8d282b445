"""Optimizers: a registry, the parameter groups they get, and their state as named tensors.

A new optimizer is an entry in `OPTIMIZERS`, whose keys the configuration accepts. A mixed one, as
Muon for the encoder's matrices and AdamW for the rest, is one subclass of `torch.optim.Optimizer`:
its function splits the groups by the names beside the parameters and marks each part, and `step`
chooses the rule by the mark. Learning rates, averages and checkpoints read only `param_groups` and
`state`, so they work unchanged. A new hyperparameter is a field of `TrainConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import nn

from raybert.config import KeyOf

Groups = list[dict[str, Any]]  # `params` are pairs of a name and a parameter
Config = Any  # TrainConfig, whose module imports this one


def _adamw(groups: Groups, config: Config) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _sgd(groups: Groups, config: Config) -> torch.optim.Optimizer:
    # A baseline, without momentum and thus without state.
    return torch.optim.SGD(groups, lr=config.lr)


#: (parameter groups, settings) -> optimizer. Each group has its own `lr` and `weight_decay`.
OPTIMIZERS: dict[str, Callable[[Groups, Config], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}

OptimizerName = Annotated[str, KeyOf(OPTIMIZERS)]


def make_optimizer(
    model: nn.Module, config: Config, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """Build the configured optimizer over a model's parameters.

    Weight decay applies to matrices, not to vectors (biases, norms). `lr_scale` gives the factor of
    the learning rate for a parameter's name, for layer-wise decay.
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
