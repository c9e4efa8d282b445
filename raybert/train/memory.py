"""A step that does not fit into memory: no restart helps, smaller micro-batches do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raybert.errors import UserError, one_line
from raybert.train.autocast import TRAIN_PRECISIONS
from raybert.train.settings import TrainConfig

#: Parts of the messages of PyTorch's allocators, where they raise no OutOfMemoryError; lower case.
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the machine's, is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):  # of mmap and fork
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _MESSAGES)


@contextmanager
def advise_on_memory(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Raise a UserError that says what to lower where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{one_line(error)[:200]}; {_advice(config, device)}") from error


def _advice(config: TrainConfig, device: torch.device) -> str:
    section, size = config.section, config.micro_batch_size
    key = f"{section}.micro_batch_size"
    ways = []
    if size > 1 and not config.deterministic:
        ways.append(
            f"lower {key}={size} to {_smaller(size)}, which changes no batch, and run it again: it "
            "resumes"
        )
    elif size > 1:
        ways.append(f"lower {key}={size} to {_smaller(size)} in a new run")
    else:
        ways.append(f"{key} is 1 already: use a smaller model or shorter texts")
    if device.type == "cuda" and not TRAIN_PRECISIONS[config.precision](device):
        ways.append(f"set {section}.precision=bf16")
    if not config.deterministic and not config.activation_checkpointing:
        ways.append(f"set {section}.activation_checkpointing=true, which computes layers twice")
    can_shard = "sharding" in type(config).model_fields and config.max_workers > 1
    if can_shard and config.shards != "full" and not config.deterministic:
        ways.append(f"set {section}.sharding=full")
    return ", or ".join(ways)


def _smaller(size: int) -> int:
    """The largest proper divisor: the global batch is a multiple of it, too."""
    return next(size // factor for factor in range(2, size + 1) if size % factor == 0)
