"""The layers of an encoder, each compiled by itself, for as long as it trains.

A whole model has what varies from batch to batch: the number of predicted tokens, and lists of
lengths. A layer has not, and all layers of a kind are one compiled function. DDP sends the
gradients of a layer while the one before it computes, as without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raybert.model.layers import EncoderLayer

#: Compiled versions of a layer: kinds of layers times shapes. PyTorch's limit is 8.
_MAX_COMPILED_VERSIONS = 64


class CompiledLayers:
    """Compiled forward passes of a model's layers."""

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        from torch._dynamo import config

        config.recompile_limit = _MAX_COMPILED_VERSIONS  # a setting of the calling thread
        self._compiled: list[tuple[nn.Module, Callable[..., Any]]] = [
            (layer, torch.compile(layer.forward, backend=backend))
            for layer in model.modules()
            if isinstance(layer, EncoderLayer)
        ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Run compiled layers for as long as the context lasts."""
        for layer, forward in self._compiled:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._compiled:
                del layer.forward  # the one of its class is left
