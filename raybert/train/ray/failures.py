"""Why training failed: the exceptions of the workers, out of the ones that Ray wraps them in."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from pyarrow import ArrowException
from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, PreemptionError

from raybert.cluster.internals.train import is_health_check_timeout, is_startup_timeout
from raybert.errors import DamagedError, RaybertError, StorageError, UserError
from raybert.train.task import Preempted

#: What Python raises for a program's mistake. OSError is not among them.
_OF_PROGRAMS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
#: Parts of PyTorch's messages about a device, which another node may not have.
_OF_DEVICES = ("CUDA error", "CUDA driver", "cuDNN", "CUBLAS", "CUDNN", "NVML", "HIP error")
#: Those of them that a program causes: an index past a table's end, matrices of other shapes.
_OF_KERNELS = ("device-side assert", "_STATUS_INVALID_VALUE")


def find_causes(error: Exception) -> list[Exception]:
    """The exceptions of the failed workers, by rank; the controller's own if no worker failed."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    if not failures:
        return [getattr(error, "controller_failure", error)]
    return [_unwrap(failures[rank]) for rank in sorted(failures)]


def is_loss_of_nodes(error: Exception) -> bool:
    """Whether the run only lost nodes with notice, or waits for new ones: no failure of its own."""
    if isinstance(error, PreemptionError):
        return True
    if isinstance(error, ControllerError):
        return is_startup_timeout(error.controller_failure)
    return any(isinstance(cause, Preempted) for cause in find_causes(error))


def is_permanent(error: Exception) -> bool:
    """Whether a worker's error would come again after a restart: one of the program or its data.

    Others may be of a node that was lost: of Ray, the network, the storage or a device.
    """
    cause = _unwrap(error)
    if isinstance(cause, RayError | ArrowException | dist.DistError):
        return False
    if isinstance(cause, RuntimeError):
        text = str(cause)
        if any(word in text for word in _OF_KERNELS):
            return True
        return not (_is_consequence(cause) or any(word in text for word in _OF_DEVICES))
    return isinstance(cause, _OF_PROGRAMS)


def format_failure(error: Exception) -> str:
    """Why training was interrupted, in a line."""
    if isinstance(error, PreemptionError):
        return "a node is taken away"
    causes = find_causes(error)
    cause = next((c for c in causes if not _is_consequence(c)), causes[0])
    if isinstance(cause, RayActorError):
        return "a worker was lost"
    if is_health_check_timeout(cause) or _is_consequence(cause):
        return "a worker does not answer"
    if is_startup_timeout(cause):
        return "not all workers found a place in time"
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1][:200]


def to_user_error(error: Exception) -> Exception:
    """The exception to raise on the driver: the first failing worker's, or one that quotes it."""
    cause = find_causes(error)[0]
    if isinstance(cause, UserError | StorageError | DamagedError):
        return cause
    return RaybertError(f"training failed: {format_failure(error)}")


def _unwrap(failure: Exception) -> Exception:
    """The innermost exception; Ray's own have a `cause`, too, which may be a string."""
    for name in ("health_check_failure", "cause"):
        inner = getattr(failure, name, None)
        if isinstance(inner, Exception):
            return _unwrap(inner)
    return failure


def _is_consequence(error: Exception) -> bool:
    """Whether it is what gloo or NCCL raise on the other workers when one is lost."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection", "Timed out", "timeout")
    )
