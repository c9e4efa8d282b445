"""What the page's template renders: tables, tiles and figures, and values as text.

The strings are text, which the template escapes. Only a figure's SVG is markup.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from raybert.config import flatten
from raybert.report.stage_files import number
from raybert.terminal.formats import format_duration

_LATEST = 253_402_300_800  # seconds from 1970 to the year 10000, which a date does not have
_METRIC_NAMES = {
    "expected_calibration_error": "calibration error",
    "f1": "F1",
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
    "mae": "MAE",
    "r2": "R²",
    "rmse": "RMSE",
    "spearman": "Spearman correlation",
}


def metric_name(name: str, *, begins: bool = False) -> str:
    """A metric in words; `begins`: with a capital letter."""
    words = _METRIC_NAMES.get(name, name.replace("_", " "))
    return words[:1].upper() + words[1:] if begins else words


def format_metric(name: str, value: float) -> str:
    """The value of a metric; an accuracy in per cent."""
    return f"{value:.2%}" if metric_name(name) == "accuracy" else f"{value:,.4f}"


class Tile(NamedTuple):
    """A headline number."""

    label: str
    value: str
    note: str = ""


class Figure(NamedTuple):
    """A plot with its caption."""

    title: str
    svg: Markup
    note: str = ""


class Cell(NamedTuple):
    """A cell of a table that has more than text."""

    text: str
    note: str
    heat: float  # 0 to 1: how dark its background is


@dataclass(frozen=True)
class Table:
    """A table; one without rows is not shown."""

    title: str
    rows: Sequence[Sequence[str | Cell]]
    head: Sequence[str] = ()
    has_row_headers: bool = False  # whether the first cell of a row is its header
    css_class: str = ""


def key_value_table(title: str, values: Mapping[str, Any]) -> Table:
    """A table of a nested mapping, a row for each leaf."""
    rows = [
        (key.replace("_", " ").replace(".", " · "), format_value(value, key))
        for key, value in flatten(values)
    ]
    return Table(title, rows, has_row_headers=True, css_class="facts")


def format_value(value: Any, key: str = "") -> str:
    """Format a JSON value; numbers under the dotted key `seconds` are durations."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if key.rsplit(".", 1)[-1] == "seconds" or key.startswith("seconds."):
            return format_duration(value) if math.isfinite(value) else str(value)
        return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.5g}"
    if isinstance(value, Mapping):
        if "token" in value:
            return f"{value['token']} {number(value.get('probability')) or 0:.1%}"
        return json.dumps(value, ensure_ascii=False) if value else "none"
    if isinstance(value, (list, tuple)):
        if len(value) > 8:
            return f"{len(value):,} items"
        return ", ".join(format_value(item) for item in value) or "none"
    return str(value)


def format_time(seconds: Any) -> str:
    """Format seconds since 1970 as a date and a time of day; empty where it is no number."""
    value = number(seconds)
    if value is None or not 0 <= value < _LATEST:
        return ""
    return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
