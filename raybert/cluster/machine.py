"""This machine's processor: its name and its instruction sets, as Linux reports them."""

from __future__ import annotations

import functools
import platform


def cpu_name() -> str:
    """The processor's model name; its architecture where Linux reports no name."""
    return _cpu_info().get("model name") or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The x86 instruction sets of the processor, such as `avx512_bf16`; empty on other systems."""
    return frozenset(_cpu_info().get("flags", "").split())


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
