"""What a message says about a local path that is not there: the names that are near it."""

from __future__ import annotations

import difflib
import os
from contextlib import suppress

_MOST_NAMES = 2000  # of a folder, among which near ones are looked for
_SHOWN = 3


def near_names(path: str) -> str:
    """The end of a message about a path that does not exist; empty where nothing is near.

    It names what the deepest folder that exists has in place of the next part of the path: names
    that are spelled alike, or else the first ones.
    """
    if "://" in path:
        return ""
    above, missing = os.path.split(os.path.expanduser(path).rstrip("/"))
    while above and not os.path.lexists(above):
        above, missing = os.path.split(above)
    names: list[str] = []
    with suppress(OSError):
        names = sorted(name for name in os.listdir(above or ".") if name.isprintable())
    # A link to nothing has the missing name itself.
    shown = [name for name in names if not name.startswith(".") and name != missing]
    lowered = {name.lower(): name for name in reversed(shown[:_MOST_NAMES])}
    near = difflib.get_close_matches(missing.lower(), list(lowered), n=_SHOWN, cutoff=0.7)
    if near:
        found = (os.path.join(above, lowered[name]) for name in near)
        return f" (did you mean {' or '.join(found)}?)"
    if above in ("", "/") or not shown:  # there, only what is spelled alike
        return ""
    more = ", ..." if len(shown) > _SHOWN else ""
    return f"; {above} has {', '.join(shown[:_SHOWN])}{more}"


def looks_like_path(text: str) -> bool:
    """Whether a text that may be the name of a model on a hub rather is a mistyped path."""
    parts = text.split("/")
    is_one = text.startswith((".", "/", "~")) or "://" in text or len(parts) > 2
    return is_one or (len(parts) == 2 and os.path.isdir(parts[0]))
