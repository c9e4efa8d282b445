"""`/docs`: the OpenAPI document as a page to read. It runs no script, and asks nobody else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_JSON = "application/json"
_HEAD = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>{title}: API</title>
  <link rel="icon" href="icon.svg">
  <link rel="stylesheet" href="style.css">
</head>
<body>
<header><p class="brand">{title}</p><p class="quiet">{version}</p></header>
<main>
<h1>API</h1>
<p>As a document for tools: <a href="openapi.json">openapi.json</a>. Where the server has keys:
<code>Authorization: Bearer KEY</code>.</p>
"""


def page(document: Mapping[str, Any]) -> str:
    """Write an OpenAPI document as HTML."""
    told = document["info"]
    parts = [_HEAD.format(title=escape(told["title"]), version=escape(told["version"]))]
    parts += [
        _operation(method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = document["components"]["schemas"]
    named = sorted(set(_mentioned(document["paths"], schemas)))
    parts += ["<h2>Forms</h2>", *(_form(name, schemas[name]) for name in named)]
    return "\n".join([*parts, "</main>", "</body>", "</html>", ""])


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    lines = [f"<h2><code>{method} {escape(path)}</code></h2>"]
    lines += [f"<p>{escape(operation['summary'])}</p>"]
    body = operation.get("requestBody")
    if body:
        content = body["content"][_JSON]
        lines.append(f"<p>Takes {_kind(content['schema'])}, for instance</p>")
        lines.append(_shown(content["example"]))
    for status, answer in operation["responses"].items():
        kinds = [_kind(content["schema"]) for content in answer.get("content", {}).values()]
        told = escape(answer["description"]) if status != "200" else " ".join(kinds)
        lines.append(f'<p class="quiet">{status} {told}</p>')
        examples = (found.get("example") for found in answer.get("content", {}).values())
        lines += [_shown(example) for example in examples if example is not None]
    return "\n".join(['<section class="card">', *lines, "</section>"])


def _shown(example: Any) -> str:
    return f"<p><code>{escape(json.dumps(example))}</code></p>"


def _form(name: str, schema: Mapping[str, Any]) -> str:
    lines = [f'<section class="card" id="{escape(name)}">', f"<h3><code>{escape(name)}</code></h3>"]
    lines += [f"<p>{escape(schema['description'])}</p>"] if "description" in schema else []
    is_body = schema.get("additionalProperties") is False  # what is asked, not what is answered
    for key, value in schema.get("properties", {}).items():
        told = [_kind(value)]
        told += ["required"] if is_body and key in schema.get("required", []) else []
        default = value.get("default")
        told += [f"{escape(json.dumps(default))} by default"] if default is not None else []
        told += [escape(value["description"])] if "description" in value else []
        lines.append(f"<p><code>{escape(key)}</code> <span>{'; '.join(told)}</span></p>")
    return "\n".join([*lines, "</section>"])


def _kind(schema: Mapping[str, Any]) -> str:
    """What a value is, in words, with links to the forms."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(one))}</code>" for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return escape(str(schema.get("type", "anything")))


def _mentioned(value: Any, schemas: Mapping[str, Any]) -> Iterator[str]:
    """The names of all forms that a part of the document leads to."""
    if isinstance(value, Mapping):
        if isinstance(value.get("$ref"), str):
            name = value["$ref"].rpartition("/")[2]
            yield name
            yield from _mentioned(schemas[name], schemas)
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from _mentioned(inner, schemas)
