"""The names by which requests may address the server.

A page of another site can let its own name point to 127.0.0.1, and then send requests that its
browser takes for those of one site (DNS rebinding): the header Host has that name.
"""

from __future__ import annotations

from collections.abc import Collection


def is_allowed_host(header: str, allowed: Collection[str]) -> bool:
    """Return whether the value of a Host header has one of the allowed names, at any port."""
    name = header.lower()
    name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
    name = name.removesuffix(".")
    return name in allowed or any(
        pattern == "*" or (pattern.startswith("*.") and name.endswith(pattern[1:]))
        for pattern in allowed
    )
