"""The names by which requests may address the server.

A page of another site can let its own name point to 127.0.0.1, and then send requests that its
browser takes for those of one site (DNS rebinding): the header Host has that name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection


def is_allowed_host(header: str, allowed: Collection[str]) -> bool:
    """Return whether the value of a Host header has one of the allowed names, at any port.

    The names are as `host_name` returns them.
    """
    name = host_name(header)
    return name in allowed or any(
        pattern == "*" or (pattern.startswith("*.") and name.endswith(pattern[1:]))
        for pattern in allowed
    )


def host_name(host: str) -> str:
    """Return a name or an address in one spelling, without its port; empty if it is none."""
    name = host.lower()
    if name.startswith("["):
        name = name[1 : max(1, name.find("]"))]
    elif name.count(":") < 2:
        name = name.partition(":")[0].removesuffix(".")
    if ":" not in name:
        return name if host[:1] != "[" else ""
    try:
        return f"[{ipaddress.IPv6Address(name)}]"
    except ValueError:
        return ""
