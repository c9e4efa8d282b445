"""The OpenAPI document: bodies are read by hand, so that their schemas are added by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from raybert.serve.http.schemas import Body, Error, FillMaskRequest, InferRequest, PredictRequest

Responses = dict[int | str, dict[str, Any]]

#: When a request is answered with which status, for the document.
_REFUSALS = {
    400: "there is no text, or no JSON",
    401: "no key of this server's, where it has some",
    404: "no such model",
    408: "the body did not come in time",
    413: "more than is taken at once: bytes, texts, tokens, or texts to explain",
    415: "it is not sent as JSON",
    422: "it has another form; the error names the key",
    424: "the model failed on it",
    429: "too much waits; Retry-After says for how many seconds",
    504: "there was no answer in time",
}
_STUCK = {503: "a batch does not end, or no replica is ready"}
_TEXT = "The plot was thin, but the actors made it a joy to watch."
_SCORES = [{"label": "pos", "score": 0.91}, {"label": "neg", "score": 0.09}]
_TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [_TEXT]}
_LABEL = {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["pos"]}
_SHARES = {"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [0.09, 0.91]}
#: A request of each form, and its answer.
_EXAMPLES: dict[type[Body], tuple[Any, Any]] = {
    PredictRequest: ({"inputs": _TEXT}, _SCORES),
    FillMaskRequest: (
        {"inputs": "I liked this [MASK].", "top_k": 1},
        [[{"token_str": "movie", "score": 0.5}]],
    ),
    InferRequest: (
        {"inputs": [_TENSOR]},
        {"model_name": "reviews", "model_version": "v1", "outputs": [_LABEL, _SHARES]},
    ),
}
_FASTAPIS = "Validation Error"  # which FastAPI adds, and nothing here answers with
_DEFINED = "#/components/schemas/{model}"


def described(model: type[Body]) -> dict[str, Any]:
    """What a route is given that takes a form: its body, its answers, an example of both."""
    asked, answer = _EXAMPLES[model]
    reference = {"$ref": _DEFINED.format(model=model.__name__)}
    taken = {"application/json": {"schema": reference, "example": asked}}
    answered = {"description": "Answered", "content": {"application/json": {"example": answer}}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": taken}},
        "responses": {200: answered, **refused(*_REFUSALS)},
    }


def refused(*statuses: int) -> Responses:
    """What a route is given that may refuse."""
    told = _REFUSALS | _STUCK
    return {status: {"model": Error, "description": told[status]} for status in statuses}


def openapi(app: FastAPI) -> dict[str, Any]:
    """Make the document, once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for methods in document["paths"].values():
            for operation in methods.values():
                if operation["responses"].get("422", {}).get("description") == _FASTAPIS:
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for model in (PredictRequest, FillMaskRequest, InferRequest):
            schema = model.model_json_schema(ref_template=_DEFINED)
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]  # {}: where no keys are set
        app.openapi_schema = document
    return app.openapi_schema
