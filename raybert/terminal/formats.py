"""Durations, sizes and counts as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Control characters but tab and line break, other separators of lines, and what changes the
#: direction of a text: a label or a file's name with them could rewrite what the terminal shows.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    """Write control characters as escapes: that of ESC begins with a backslash, x1b."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def clock(seconds: float) -> str:
    """Format a duration as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def format_duration(seconds: float) -> str:
    """Format a duration as 45 s, 12 min, 12 min 34 s, 3 h 05 min or 3 d 4 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 48 * 60:
        return f"{minutes // 1440} d {minutes // 60 % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"


def size(count: float) -> str:
    """Format bytes as 512 bytes, 3.4 kB, 149 MB or 1.2 GB."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if count < 1000:
            break
        count, unit = count / 1000, larger
    return f"{count:.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"


def format_count(value: float) -> str:
    """Format a number with three digits and a unit: 9,999, 10.0k, 14.3M."""
    if value < 1e4:
        return f"{value:,.0f}"
    divisor, unit = next(
        u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= u[0]
    )
    scaled = value / divisor
    return f"{scaled:,.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{unit}"


def mean_and_deviation(runs: Mapping[str, Any]) -> str:
    """Format the `mean` of several runs with its standard deviation `std`: 0.9012 ± 0.0034."""
    if runs["mean"] is None:
        return "none"
    return f"{runs['mean']:.4f}" + ("" if runs["std"] is None else f" ± {runs['std']:.4f}")
