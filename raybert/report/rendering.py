"""Pages of the report's look, each one file, rendered by Jinja2 templates that escape all text."""

from __future__ import annotations

import datetime
from typing import Any

import jinja2

from raybert import __version__


def render_page(template: str, title: str, **values: Any) -> str:
    """Render a template of `templates/` as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raybert.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        title=title,
        version=__version__,
        now=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
