"""Muon, PyTorch's, for matrices of which each rank has a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from raybert.train.sharding import is_sharded, shard_like, whole


class Muon(torch.optim.Muon):
    """Muon, of sharded matrices, too: their momenta are sharded, their updates are gathered."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; a closure is not supported."""
        if not any(is_sharded(p) for group in self.param_groups for p in group["params"]):
            return super().step()  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_sharded(parameter, group)
        return None

    def _step_sharded(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        # As `torch.optim.Muon` does it, with its own functions.
        gradient, momentum = parameter.grad, group["momentum"]
        assert gradient is not None
        if "momentum_buffer" not in self.state[parameter]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = self.state[parameter]["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = _zeropower_via_newtonschulz(
            whole(gradient.lerp(buffer, momentum)),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        )
        lr = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(shard_like(update, parameter), alpha=-lr)
