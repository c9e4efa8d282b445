"""This machine: its cores, processor, GPU and memory allocator."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import TYPE_CHECKING, Any

from raybert import __version__

if TYPE_CHECKING:  # the command line imports this module before it needs PyTorch
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_KEEP_BYTES = 2**31 - 1  # mallopt takes an int

#: The same as environment variables of a process that will train. One arena, because threads other
#: than the main one have heaps of 64 MB, which are unmapped whenever they are empty.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEEP_BYTES),
    "MALLOC_ARENA_MAX": "1",
}


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name; its architecture where Linux reports no name."""
    return _cpu_info().get("model name") or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The x86 instruction sets of the processor, such as `avx512_bf16`; empty on other systems."""
    return frozenset(_cpu_info().get("flags", "").split())


def device_name(device: torch.device) -> str:
    """The model name of a GPU, or of the processor."""
    if device.type != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; emulated bf16 is slower than fp32."""
    if device.type != "cuda":
        return not cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16"))
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def describe_machine(device: torch.device, *, workers: int, threads: int) -> dict[str, Any]:
    """The versions and the hardware that a run's figures were measured with."""
    import torch

    return {
        "raybert": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "workers": workers,
        "threads": threads,
    }


@functools.cache
def _cpu_info() -> dict[str, str]:
    """The fields of the first processor in `/proc/cpuinfo`; empty where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read().split("\n\n")[0]
    except OSError:  # not Linux
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def keep_freed_memory() -> bool:
    """Make this process keep up to 2 GiB of freed memory; call it once, before the first step.

    A step frees what the next one allocates. glibc returns blocks of many megabytes to the kernel
    at once, and mapping them again is a page fault every 4 KiB: 55,000 per step at the Keras
    example's shape, 15 to 20% of its time on CPUs. False: the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
