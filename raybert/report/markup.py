"""Elements that escape their text, and values as people write them.

Reviews and labels contain markup. Everything goes through `tag`, which escapes whatever is not
`Html`: text that is forgotten on its way is escaped, never let through.
"""

from __future__ import annotations

import datetime
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raybert.config import flatten
from raybert.report.stage_files import number


class Html(str):
    """Markup, as against text that must be escaped first."""


def tag(name: str, *children: str, **attributes: str) -> Html:
    """Make an element; plain strings among its children, and attributes, are escaped.

    An attribute's name may end in `_` (`class_`).
    """
    inner = "".join(c if isinstance(c, Html) else html.escape(c) for c in children)
    shown = "".join(f' {k.rstrip("_")}="{html.escape(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{shown}>{inner}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """Put markup after markup."""
    return Html("".join(parts))


def fold(title: str, content: Html) -> Html:
    """Content that opens at a click; nothing where there is none."""
    return tag("details", tag("summary", title), content) if content else Html()


def facts(title: str, values: Mapping[str, Any]) -> Html:
    """A table of everything in a mapping."""
    return join([tag("h3", title), rows(values)]) if values else Html()


def rows(values: Mapping[str, Any]) -> Html:
    """A table of a nested mapping, a row a leaf; nothing where it is empty."""
    body = [
        tag("tr", tag("th", _spaced(key), scope="row"), tag("td", show(value, key)))
        for key, value in flatten(values)
    ]
    return table(Html(), body, "facts") if body else Html()


def _spaced(key: str) -> str:
    return key.replace("_", " ").replace(".", " · ")


def table(head: Html, body: Sequence[Html], class_: str = "") -> Html:
    """A table that scrolls by itself where the screen is narrower; `head` may be empty."""
    inner = [tag("thead", head)] if head else []
    whole = tag("table", *inner, tag("tbody", *body), class_=class_)
    return tag("div", whole, class_="scroll")


def duration(seconds: float) -> str:
    """Say a time as people do: 45 s, 12 min 34 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def show(value: Any, key: str = "") -> str:
    """A value as text; `key` tells times from other numbers."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key.rsplit(".", 1)[-1] == "seconds" or key.startswith("seconds."):
            return duration(value) if math.isfinite(value) else str(value)
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.5g}"
    if isinstance(value, Mapping):
        if "token" in value:
            return f"{value['token']} {number(value.get('probability')) or 0:.1%}"
        return json.dumps(value, ensure_ascii=False) if value else "none"
    if isinstance(value, (list, tuple)):
        if len(value) > 8:
            return f"{len(value):,} items"
        return ", ".join(show(item) for item in value) or "none"
    return str(value)


def big(value: float) -> str:
    """Three digits and a unit: 14.3M."""
    if value < 1e4:
        return f"{value:,.0f}"
    size, unit = next(u for u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= u[0])
    scaled = value / size
    return f"{scaled:,.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{unit}"


def clock(seconds: Any) -> str:
    """Say when: seconds since 1970 as a date and a time of day."""
    value = number(seconds)
    if value is None:
        return ""
    return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
