"""The group of processes that train together, and its collectives.

A group of one process sends nothing: the loop then runs without Ray, without `torch.distributed`
and without a network.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Self, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from raybert.cluster.machine import cores
from raybert.config import Settings
from raybert.train.tensor_file import Tensors

T = TypeVar("T")


class DDPConfig(Settings):
    """How gradients are summed over workers."""

    deterministic: bool = Field(
        False, description="equal bit for bit for the same number of workers, restarts included"
    )
    gradients: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="in what the workers send gradients to each other; bf16: half the bytes, for "
        "networks that are slower than the step",
    )
    bucket_mb: int = Field(25, ge=1, description="megabytes of gradients that are sent at once")

    @model_validator(mode="after")
    def _check_gradients(self) -> Self:
        if self.deterministic and self.gradients != "fp32":
            raise ValueError(
                f"gradients={self.gradients} and deterministic=true exclude each other; "
                "use gradients=fp32"
            )
        return self


class _Work:
    """An action in a thread of its own: its result, or its error in a picklable form."""

    def __init__(self, action: Callable[[], Any], device: torch.device) -> None:
        self._action, self._device = action, device
        self.result: Any = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="work", daemon=True)
        self._thread.start()

    def is_running(self, seconds: float) -> bool:
        """Wait for its end for some seconds; whether it still runs."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":  # a thread begins with the first device
                torch.cuda.set_device(self._device)
            self.result = self._action()
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
                self.error = error
            except Exception:  # the other ranks can't be sent it
                self.error = RuntimeError(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Group:
    """This process's rank among those that train together, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    numbers: Any = None  # the processes over gloo, for numbers that GPUs are not waited for

    @classmethod
    def current(cls, device: torch.device, timeout_s: float | None = None) -> Group:
        """The group of `torch.distributed`; one process where that is not initialised.

        `timeout_s` is that of collectives of numbers, in which all ranks begin together.
        """
        if not dist.is_initialized():
            return cls(device=device)
        numbers = None
        if dist.get_backend() != "gloo" and dist.is_gloo_available():
            timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
            numbers = dist.new_group(backend="gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), device, numbers)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """The largest of the ranks' numbers."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return list(values)
        device = self.device if self.numbers is None else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, operation, group=self.numbers)
        return [float(v) for v in tensor.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Collect a picklable object from every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable object on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def broadcast_tensors(
        self,
        tensors: Tensors | None,
        keep: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    ) -> Tensors:
        """Return rank 0's tensors, on the CPU, on every rank; the others give none.

        `keep` gets each as it arrives, and returns what this rank keeps of it.
        """
        if self.world_size == 1:
            assert tensors is not None
            return tensors
        mine = tensors or {}
        shapes = self.broadcast({name: (t.shape, t.dtype) for name, t in mine.items()})
        received = {}
        for name, (shape, dtype) in shapes.items():
            tensor = mine.get(name)
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype)
            # As bytes: gloo and NCCL do not know every type.
            data = tensor.detach().contiguous().flatten().view(torch.uint8).to(self.device)
            if data.numel():
                dist.broadcast(data, src=0)
            whole = tensor if self.rank == 0 else data.cpu().view(dtype).view(shape)
            received[name] = keep(name, whole)
        return received

    def wait_for(self, action: Callable[[], T], timeout_s: float) -> T:
        """Run a different action on each rank, and return its result when all have ended.

        A collective fails after `timeout_s`. The action may take longer: it runs in a thread, and
        the ranks tell each other that they are still there. The first rank's error is raised on
        all of them.
        """
        if self.world_size == 1:
            return action()
        work = _Work(action, self.device)
        while self.sum([work.is_running(timeout_s / 4)])[0]:
            pass
        errors = [error for error in self.gather(work.error) if error is not None]
        if errors:
            raise errors[0] from work.error
        return cast(T, work.result)

    def first(self, action: Callable[[], T], timeout_s: float) -> T:
        """Run an action on rank 0, as `wait_for` does, and return its result on every rank."""
        mine = action if self.rank == 0 else lambda: None
        return cast(T, self.broadcast(self.wait_for(mine, timeout_s)))

    def share(self, items: range) -> range:
        """The items of this rank; every item belongs to exactly one rank."""
        return items[self.rank :: self.world_size]

    def wrap(
        self,
        module: nn.Module,
        *,
        deterministic: bool,
        gradients: str = "fp32",
        bucket_mb: int = 25,
    ) -> nn.Module:
        """Wrap a model in DDP; `deterministic` adds gradients in the order of ranks."""
        if self.world_size == 1:
            return module
        wrapped = DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # they are constants of the model
            bucket_cap_mb=bucket_mb,
        )
        if deterministic:
            # A lambda: DDP refuses a hook whose annotations are strings.
            wrapped.register_comm_hook(None, lambda state, bucket: _sum_in_rank_order(bucket))
        elif gradients == "bf16":  # a lambda: by its name DDP refuses this hook without NCCL
            compress: Any = default_hooks.bf16_compress_hook
            wrapped.register_comm_hook(None, lambda state, bucket: compress(state, bucket))
        return wrapped


def _sum_in_rank_order(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients by adding in the order of ranks.

    A ring all-reduce adds each chunk in an order that depends on its position in the bucket, and
    DDP rebuilds its buckets after the first step: a resumed run would add in another order.
    """
    buffer: torch.Tensor = bucket.buffer()
    world_size = dist.get_world_size()
    gathered = [torch.empty_like(buffer) for _ in range(world_size)]
    work = dist.all_gather(gathered, buffer, async_op=True)

    def add(future: torch.futures.Future[Any]) -> torch.Tensor:
        future.wait()
        total = gathered[0]
        for other in gathered[1:]:
            total += other
        buffer.copy_(total.div_(world_size))
        return buffer

    future: torch.futures.Future[torch.Tensor] = work.get_future().then(add)
    return future


def use_interface_of(address: str) -> None:
    """Make gloo use the interface with an IPv4 address, unless GLOO_SOCKET_IFNAME names one."""
    name = _interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interface_of(address: str) -> str | None:
    """The name of the network interface with an IPv4 address; None where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return str(name)
    return None


def use_threads(threads: int | None, workers_here: int) -> int:
    """Set and return the number of threads; None: the machine's cores divided by its workers."""
    count = threads or max(1, cores() // max(1, workers_here))
    torch.set_num_threads(count)
    return count
