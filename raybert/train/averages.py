"""Exponential moving averages of the weights: if configured, they are evaluated and kept.

Not `torch.optim.swa_utils.AveragedModel`: it averages all parameters from its first update on. Here
a parameter's average begins at its own first update, so the initial values of a frozen layer are
not averaged in after it is unfrozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverages:
    """The moving averages of a model's parameters; without a decay there are none."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start without averages; an update keeps `decay` of them, 0 to 1; 0: there are none."""
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        self._averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights that a step has just set, before `zero_grad`.

        The first updates keep less than the decay, `(1 + step) / (10 + step)`, or the averages
        would contain the initial weights for long (as TensorFlow's ExponentialMovingAverage). A
        parameter that was never updated has no average.
        """
        if not self._decay:
            return
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            if name in self._averages:
                self._averages[name].lerp_(parameter, weight)
            elif parameter.grad is not None:
                self._averages[name] = parameter.detach().clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name, not copied."""
        return dict(self._averages)

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the averages by those of a checkpoint."""
        if self._decay:
            devices = {name: parameter.device for name, parameter in self._parameters.items()}
            self._averages = {name: t.to(devices[name]) for name, t in tensors.items()}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages, bit for bit."""
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the averages in the model for as long as the context lasts."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
