"""The optimizer's groups, the learning rate's schedule, and the weights' moving averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raybert.train.settings import TrainConfig

_AVERAGE = "average"  # the slot of the optimizer's state that has a parameter's moving average


def schedule_at(step: int, total: int, warmup: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at a step, 0 to 1.

    Warm-up rises linearly and reaches 1 at step `warmup`; what follows reaches 0 at step `total`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = max(0, total - step)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return left / max(1, total - warmup)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * (1 - left / max(1, total - warmup))))
        case "stable-decay":
            return min(1.0, left / max(1, round(total * config.decay_fraction)))


def make_optimizer(
    model: nn.Module,
    config: TrainConfig,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW:
    """Build AdamW (arXiv 1711.05101) over a model's parameters.

    Matrices decay, vectors (biases, norms) do not. `scale` gives a parameter's share of the
    learning rate by its name: layer-wise decay is one such function.
    """
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((parameter.ndim >= 2, scale(name)), []).append((name, parameter))
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "weight_decay": config.weight_decay if decays else 0.0,
                "scale": share,
                "lr": config.lr * share,
            }
            for (decays, share), members in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `<parameter>|<slot>`."""
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{slot}"] = torch.as_tensor(value)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put `optimizer_tensors` back."""
    states: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("|")
        states.setdefault(name, {})[slot] = tensor
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            optimizer.state.pop(parameter, None)
            if name in states:
                # AdamW's fused kernel wants its step counter in fp32 on the parameter's device.
                optimizer.state[parameter] = {
                    slot: tensor.to(parameter.device) for slot, tensor in states[name].items()
                }


def average_weights(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Draw each parameter's moving average towards it; called after a step.

    The averages lie in the optimizer's state, so checkpoints have them. The first ones reach back
    less far than `decay` says, or the fresh weights of the first step would be in them for long.
    A parameter that has never been trained has no average: it is its own.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for parameter, state in _trained(optimizer):
        if _AVERAGE in state:
            state[_AVERAGE].lerp_(parameter.detach(), weight)
        else:
            state[_AVERAGE] = parameter.detach().clone()


def swap_averages(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the parameters and their averages, bit for bit."""
    for parameter, state in _trained(optimizer):
        if _AVERAGE in state:
            kept = parameter.detach().clone()
            parameter.detach().copy_(state[_AVERAGE])
            state[_AVERAGE].copy_(kept)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the averages in the parameters' place for as long as the context lasts."""
    swap_averages(optimizer)
    try:
        yield
    finally:
        swap_averages(optimizer)


def averages_in(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The averages among `optimizer_tensors`, by the names of their parameters."""
    end = f"|{_AVERAGE}"
    return {name.removesuffix(end): t for name, t in tensors.items() if name.endswith(end)}


def _trained(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The parameters that have been trained, with their state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                yield parameter, state
