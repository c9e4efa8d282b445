"""Sharding: each rank has a part of the weights, gradients and optimizer states.

ZeRO (arXiv 1910.02054) and FSDP (arXiv 2304.11277), by `torch.distributed.fsdp.fully_shard`.

The copy that trains is sharded. The task's own model has no memory meanwhile: it is filled with the
whole weights to be evaluated and to be written, so that no task knows of shards.

`whole` is a collective: all ranks call it, for the same tensors in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raybert.model.layers import EncoderLayer
from raybert.train.tensor_file import Tensors

#: What a rank has only a part of. `optimizer`: optimizer states and summed gradients; weights are
#: whole from a step's first forward pass to its last backward pass. `full`: weights, too; each
#: layer's are gathered before it computes.
Sharding = Literal["none", "optimizer", "full"]


def sharded_copy(
    model: nn.Module, device: torch.device, sharding: Sharding, gradients: str = "fp32"
) -> nn.Module:
    """Copy a model, sharded over the ranks layer by layer, and free the model's own memory.

    `gradients`: the type in which they are summed, fp32 or bf16.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    sharded = copy.deepcopy(model)
    free(model)
    settings: Any = {
        "mesh": DeviceMesh.from_group(dist.group.WORLD, device.type),  # type: ignore[arg-type]
        "mp_policy": MixedPrecisionPolicy(
            reduce_dtype=torch.bfloat16 if gradients == "bf16" else None
        ),
    }
    for layer in [m for m in sharded.modules() if isinstance(m, EncoderLayer)]:
        fully_shard(layer, reshard_after_forward=sharding == "full", **settings)
    fully_shard(sharded, reshard_after_forward=False, **settings)
    return sharded


@contextmanager
def accumulating(module: nn.Module, sharding: Sharding) -> Iterator[None]:
    """Leave gradients unsummed over the ranks in a backward pass that is not a step's last."""
    if not hasattr(module, "set_requires_gradient_sync"):
        no_sync: Any = getattr(module, "no_sync", nullcontext)
        with no_sync():
            yield
        return
    sharded: Any = module
    _synchronize(sharded, False, sharding)
    try:
        yield
    finally:
        _synchronize(sharded, True, sharding)


def _synchronize(sharded: Any, is_last: bool, sharding: Sharding) -> None:
    sharded.set_requires_gradient_sync(is_last)
    sharded.set_is_last_backward(is_last)
    # Weights that stay whole are gathered once a step, however many micro-batches a rank has.
    sharded.set_reshard_after_backward(is_last or sharding == "full")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has a part of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor on every rank; itself where it is not sharded."""
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, sharded as a parameter is, on its device; a copy."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    size = -(-len(tensor) // mesh.size())  # rows of a part; the last parts may have fewer, or none
    begin = size * mesh.get_local_rank()
    part = tensor[begin : begin + size].to(parameter.device, copy=True)
    return DTensor.from_local(
        part,
        mesh,
        parameter.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@torch.no_grad()
def fill(model: nn.Module, tensors: Tensors) -> None:
    """Give a model the whole weights, gathered from `tensors` on all ranks."""
    for name, parameter in model.named_parameters():
        parameter.data = whole(tensors[name].detach())


def free(model: nn.Module) -> None:
    """Free the memory of a model's weights; their shapes stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)


@contextmanager
def whole_weights(model: nn.Module, trained: nn.Module) -> Iterator[None]:
    """Put the weights that are trained in the task's model, for as long as the context lasts."""
    if model is trained:
        yield
        return
    fill(model, dict(trained.named_parameters()))
    try:
        yield
    finally:
        free(model)
