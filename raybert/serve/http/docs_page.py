"""`/docs`: the OpenAPI document as an HTML page without scripts and without other servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_ENVIRONMENT = Environment(
    loader=PackageLoader("raybert.serve.http"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.filters["json"] = json.dumps  # tojson marks its result as safe, unescaped


def render(document: Mapping[str, Any]) -> str:
    """Render an OpenAPI document as HTML."""
    return _ENVIRONMENT.get_template("docs.html").render(document)
