"""The Open Inference Protocol, version 2: texts as BYTES in, labels and scores as tensors out.

Metadata (`/v2`, `/v2/models/NAME`), readiness and `POST /v2/models/NAME/infer`. Each path of a
model exists with and without `/versions/VERSION`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BeforeValidator, Field
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

from raybert import __version__
from raybert.serve import request_errors
from raybert.serve.http.binary_tensors import LENGTH_HEADER, BinaryRequest, respond
from raybert.serve.http.json_route import (
    ClosedModel,
    Inputs,
    JSONRequest,
    JSONRoute,
    RequestBody,
    check_texts,
    content_type,
)
from raybert.serve.http.middleware import TEXT_COUNT
from raybert.serve.http.openapi import error_responses, example
from raybert.serve.http.server_routes import check_ready
from raybert.serve.runtime.loaded_models import LoadedModel
from raybert.serve.runtime.service import Service

#: Of the protocol; `triton_routes` has those but the first.
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
_MODEL = "/v2/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_BINARY = "application/octet-stream"
_ALSO = f"also at {_VERSION}"
_TEXT = "The plot was thin, but the actors made it a joy to watch."
_EXAMPLE = example(
    request={"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [_TEXT]}]},
    response={
        "model_name": "reviews",
        "model_version": "v1",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["pos"]},
            {"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [0.09, 0.91]},
        ],
    },
)


def _flatten(value: Any) -> Any:
    """Return a tensor's elements in order; the protocol allows lists nested as its shape is."""
    while isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        value = [inner for item in value for inner in item]
    return value


class InferInput(ClosedModel):
    """A tensor of the Open Inference Protocol: texts."""

    name: str = "text"
    # Bounded, since the product of its elements is computed.
    shape: Annotated[list[int], Field(fail_fast=True, max_length=8)]
    datatype: Literal["BYTES"]
    data: Annotated[
        list[str],
        Field(fail_fast=True, description="the texts, flat or nested as the shape is"),
        BeforeValidator(_flatten, json_schema_input_type=list[Any]),
    ]
    parameters: dict[str, Any] | None = None


class InferOutput(ClosedModel):
    """A requested output."""

    name: str = Field(description="as in the model's metadata: label or scores, for instance")
    parameters: dict[str, Any] | None = Field(None, description="binary_data: after the JSON")


class InferRequest(RequestBody):
    """A request of the Open Inference Protocol, version 2."""

    id: str | None = Field(None, max_length=256)
    model_name: str | None = Field(None, description="accepted; the path names the model")
    model_version: str | None = Field(None, description="accepted; the path names the version")
    inputs: Annotated[list[InferInput], Field(fail_fast=True, max_length=1)]
    # Bounded: each output is sent in full, and a small request would get a large response.
    outputs: Annotated[list[InferOutput], Field(fail_fast=True, max_length=2)] | None = None
    parameters: dict[str, Any] | None = Field(
        None,
        description="truncate: as in PredictRequest; binary_data_output: all outputs after the "
        "JSON",
    )


class InferRoute(JSONRoute):
    """Accepts a body without Content-Type, as clients of the protocol send it, but not from pages.

    A browser asks the server before a page of another origin sends JSON, and not before it sends a
    body without a type.
    """

    request_class: type[JSONRequest] = BinaryRequest

    def check_headers(self, headers: Headers) -> None:
        """Raise RequestError, 415, for a body that is not JSON, or JSON with tensors after it."""
        if LENGTH_HEADER in headers and content_type(headers) in ("", _BINARY):
            return  # a browser asks before a page sends this header
        if content_type(headers) or "origin" in headers or "sec-fetch-site" in headers:
            super().check_headers(headers)


def find_version(service: Service, name: str, version: str | None) -> LoadedModel:
    """Return a model by its name and version, None: any; or raise RequestError, 404."""
    model = service.find(name)
    if version is not None and version != model.version:
        raise request_errors.not_found(
            f"no such version of {name}; version {model.version} is served"
        )
    return model


def add_open_inference_routes(app: FastAPI, service: Service) -> None:
    """Add the protocol's routes, except its health checks."""

    def find(name: str, request: Request) -> LoadedModel:
        return find_version(service, name, request.path_params.get("version"))

    @app.get("/v2", responses=error_responses(401), summary="The server's metadata")
    async def server_metadata() -> dict[str, Any]:
        return {"name": "raybert", "version": __version__, "extensions": EXTENSIONS}

    @app.get(_VERSION, include_in_schema=False)
    @app.get(_MODEL, responses=error_responses(401, 404), summary=f"A model's metadata; {_ALSO}")
    async def model_metadata(name: str, request: Request) -> dict[str, Any]:
        model = find(name, request)
        return {
            "name": model.name,
            "versions": [model.version],
            "platform": "raybert_pytorch",
            "inputs": [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [-1, 2] if model.classifier.reads_pairs else [-1],
                }
            ],
            "outputs": [
                {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
                for tensor in model.classifier.task.tensors([], None)
            ],
            "parameters": {"task": model.classifier.task.name, "labels": model.labels},
        }

    @app.get(f"{_VERSION}/ready", include_in_schema=False)
    @app.get(
        f"{_MODEL}/ready",
        responses=error_responses(401, 404, 503),
        summary=f"Whether a model is ready; {_ALSO}/ready",
    )
    async def model_ready(name: str, request: Request) -> dict[str, Any]:
        return {"name": find(name, request).name, **check_ready(service)}

    async def infer(name: str, body: InferRequest, request: Request) -> Response:
        request.scope[TEXT_COUNT] = sum(len(tensor.data) for tensor in body.inputs)
        classifier = find(name, request).classifier
        known = [tensor.name for tensor in classifier.task.tensors([], None)]
        given, names, truncate = _parse(body, known, pairs=classifier.reads_pairs)
        texts = check_texts(given, service.config.max_texts, pairs=classifier.reads_pairs)
        async with asyncio.timeout(service.config.timeout_s):
            # By its name a request gets exactly this model, and never the canary.
            scored = await service.score(texts, name, truncate)
        answer: dict[str, Any] = {
            "model_name": scored.model.name,
            "model_version": scored.model.version,
        }
        if body.id is not None:
            answer["id"] = body.id
        if any(scored.is_cut):
            answer["parameters"] = {"truncated": True}
        task = scored.model.classifier.task
        words = await service.words(texts, scored)
        tensors = {tensor.name: tensor for tensor in task.tensors(scored.outputs, words)}
        outputs, is_binary = [tensors[each] for each in names], _are_binary(body, names)
        if any(is_binary):
            return respond(answer, outputs, is_binary)
        return JSONResponse({**answer, "outputs": [each._asdict() for each in outputs]})

    summary = f"Classify texts, as tensors; {_ALSO}/infer"
    for path, in_schema in ((_MODEL, True), (_VERSION, False)):
        app.router.add_api_route(
            f"{path}/infer",
            infer,
            methods=["POST"],
            route_class_override=InferRoute,
            response_model=dict[str, Any],
            include_in_schema=in_schema,
            summary=summary,
            **_EXAMPLE,
        )


def _are_binary(body: InferRequest, names: Sequence[str]) -> list[bool]:
    """Return for each output whether it is sent after the JSON."""
    default = (body.parameters or {}).get("binary_data_output") is True
    wanted = {output.name: output.parameters or {} for output in body.outputs or []}
    return [wanted.get(name, {}).get("binary_data", default) is True for name in names]


def _parse(
    body: InferRequest, known: Sequence[str], *, pairs: bool
) -> tuple[Inputs, Sequence[str], bool | None]:
    """Return texts, names of outputs, and the parameter truncate, or raise RequestError, 422."""
    if not body.inputs:
        raise request_errors.invalid("inputs: this model has one, text; got none")
    [tensor] = body.inputs
    if any(size < 0 for size in tensor.shape) or math.prod(tensor.shape) != len(tensor.data):
        raise request_errors.invalid(f"inputs.0.shape: does not fit {len(tensor.data):,} texts")
    truncate = (body.parameters or {}).get("truncate")
    if not (truncate is None or isinstance(truncate, bool)):
        raise request_errors.invalid("parameters.truncate: true or false")
    names = [output.name for output in body.outputs or []] or known
    if not set(names) <= set(known):
        raise request_errors.invalid(f"outputs: known are {', '.join(known)}")
    if not pairs:
        return tensor.data, names, truncate
    if len(tensor.data) % 2:
        raise request_errors.invalid("inputs.0.shape: this model reads pairs of texts, [n, 2]")
    return [tensor.data[i : i + 2] for i in range(0, len(tensor.data), 2)], names, truncate
