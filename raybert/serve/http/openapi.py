"""The OpenAPI document: what FastAPI does not derive from the routes, and `/docs`.

`/docs` shows it as an HTML page without scripts and without other servers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from jinja2 import Environment, PackageLoader, StrictUndefined

from raybert.serve.http.json_route import Error

Responses = dict[int | str, dict[str, Any]]

_ERRORS = {
    400: "there is no text, or no JSON",
    401: "the server has keys, and the request has none of them",
    404: "no such model",
    408: "the body did not come in time",
    413: "a limit is exceeded: bytes, texts, tokens, or texts to explain",
    415: "the body is not sent as JSON",
    422: "the body has another form; the error names the key",
    424: "the model failed on it",
    429: "the queue is full; Retry-After says for how many seconds",
    503: "a batch does not end, or no replica is ready",
    504: "the answer took too long",
}
_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 422, 424, 429, 504)
_FASTAPI_422 = "Validation Error"  # which FastAPI documents for every path parameter

DOCS_HEADERS = {
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


def error_responses(*statuses: int) -> Responses:
    """Return `responses` of a route that answers with these errors."""
    return {status: {"model": Error, "description": _ERRORS[status]} for status in statuses}


def example(request: Any, response: Any) -> dict[str, Any]:
    """Return the keyword arguments of a route with a body: an example, and its errors."""
    body = {"content": {"application/json": {"example": request}}}
    answer = {"description": "Answered", "content": {"application/json": {"example": response}}}
    return {
        "openapi_extra": {"requestBody": body},
        "responses": {200: answer, **error_responses(*_BODY_ERRORS)},
    }


def openapi(app: FastAPI, root_path: str) -> dict[str, Any]:
    """Return the document; it is made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in document["paths"].values():
            for operation in operations.values():
                if operation["responses"].get("422", {}).get("description") == _FASTAPI_422:
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]  # {}: for a server without keys
        if root_path:
            document["servers"] = [{"url": root_path}]
        app.openapi_schema = document
    return app.openapi_schema


def render_docs(document: Mapping[str, Any]) -> str:
    """Render the document as HTML."""
    return _ENVIRONMENT.get_template("docs.html").render(document)
