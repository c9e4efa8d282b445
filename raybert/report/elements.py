"""What the page's template renders: tables, tiles and figures.

Their strings are text, which the template escapes. Only a figure's SVG is markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from raybert.config import flatten
from raybert.report.values import format_value


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
