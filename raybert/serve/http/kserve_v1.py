"""KServe's first protocol, which its client speaks unless it is told otherwise."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from raybert.serve.http.json_route import RequestBody, Texts, check_texts
from raybert.serve.http.middleware import TEXT_COUNT
from raybert.serve.http.openapi import error_responses, example
from raybert.serve.http.server_routes import check_ready
from raybert.serve.runtime.service import Service
from raybert.tasks.protocol import ALL_SCORES

_MODEL = "/v1/models/{name}"
_EXAMPLE = example(
    request={"instances": ["The plot was thin, but the actors made it a joy to watch."]},
    response={"predictions": [[{"label": "pos", "score": 0.91}, {"label": "neg", "score": 0.09}]]},
)


class PredictV1Request(RequestBody):
    """A request of KServe's first protocol."""

    instances: Texts
    signature_name: str | None = Field(None, description="accepted and ignored")


def add_kserve_v1_routes(app: FastAPI, service: Service) -> None:
    """Add the routes."""

    @app.get("/v1/models", responses=error_responses(401), summary="The names of the models")
    async def names() -> dict[str, list[str]]:
        return {"models": list(service.models.classifiers)}

    @app.get(_MODEL, responses=error_responses(401, 404, 503), summary="Whether a model is ready")
    async def ready(name: str) -> dict[str, Any]:
        return {"name": service.find(name).name, **check_ready(service)}

    @app.post(
        f"{_MODEL}:predict",
        response_model=dict[str, Any],
        summary="Predict texts, by KServe's first protocol",
        **_EXAMPLE,
    )
    async def predict(name: str, body: PredictV1Request, request: Request) -> Response:
        pairs = service.find(name).classifier.reads_pairs
        given = [body.instances] if isinstance(body.instances, str) else body.instances
        texts = check_texts(given, service.config.max_texts, pairs=pairs, key="instances")
        request.scope[TEXT_COUNT] = len(texts)
        async with asyncio.timeout(service.config.timeout_s):
            scored = await service.score(texts, name, None)
            return JSONResponse({"predictions": await service.answer(texts, scored, ALL_SCORES)})
