"""The HTTP API: routes that read a body, ask the service, and answer in JSON.

`/predict` and `/fill-mask` speak text-embeddings-inference's language, `/v2` the Open Inference
Protocol's. A mistake ends in `{"error", "error_type"}` and a status of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from raybert import __version__
from raybert.serve.http import docs_page, open_inference, openapi, schemas
from raybert.serve.http.authentication import Keys
from raybert.serve.http.middleware import TEXTS, AccessMiddleware, AdmissionControl
from raybert.serve.http.schemas import (
    B,
    Explained,
    FillMaskRequest,
    Guess,
    InferRequest,
    PredictRequest,
    RequestError,
    Score,
)
from raybert.serve.runtime import replica_log
from raybert.serve.runtime.service import Service

PAGE = Path(__file__).with_name("page")

_OPEN = ("/docs", "/openapi.json", "/health", "/health/live", "/health/ready")
_OPEN_V2 = ("/v2/health/live", "/v2/health/ready")
_KINDS = {404: "NotFound", 405: "MethodNotAllowed"}
_MODEL = "/v2/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_ALSO = f"also at {_VERSION}"
_BINARY = "inference-header-content-length"  # of the protocol's extension for binary tensors


def make_api(
    service: Service, keys: Keys, *, log: logging.Logger, page: Path | None = PAGE
) -> FastAPI:
    """Make the application.

    Args:
        service: answers; it has loaded its models.
        keys: that are let in.
        log: gets a record for each request.
        page: a folder whose files are served at `/`; None, or where there is none: no page.
    """

    @asynccontextmanager
    async def following(app: FastAPI) -> AsyncIterator[None]:
        beside = [
            asyncio.create_task(service.catalog.watch()),
            asyncio.create_task(replica_log.keep_written(log)),
        ]
        try:
            yield
        finally:
            for task in beside:
                task.cancel()

    app = FastAPI(
        lifespan=following,
        title="raybert",
        version=__version__,
        docs_url=None,  # which would load its scripts from a public address
        redoc_url=None,
        redirect_slashes=False,  # to an address that a proxy before it may not know
        swagger_ui_oauth2_redirect_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    _add_answers(app, service)
    _add_states(app, service)
    _add_errors(app)
    open_paths = [*_OPEN, *_OPEN_V2, *_add_page(app, page)]
    app.state.door = AdmissionControl(service, keys, open_paths, log)
    app.add_middleware(AccessMiddleware, door=app.state.door)
    if service.config.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    app.openapi = lambda: openapi.openapi(app)  # type: ignore[method-assign]
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    """Add the routes that run a model."""

    @app.post(
        "/predict",
        response_model=list[Score] | list[list[Score]] | Explained | list[Explained],
        summary="Label texts",
        **openapi.described(PredictRequest),
    )
    async def predict(request: Request) -> Response:
        asked = await _read(request, PredictRequest, service)
        request.scope[TEXTS] = _count(asked.inputs)
        return JSONResponse(await service.predict(asked))

    @app.post(
        "/fill-mask",
        response_model=list[list[Guess]] | list[list[list[Guess]]],
        summary="Guess masked words",
        **openapi.described(FillMaskRequest),
    )
    async def fill_mask(request: Request) -> Response:
        asked = await _read(request, FillMaskRequest, service)
        request.scope[TEXTS] = _count(asked.inputs)
        return JSONResponse(await service.fill_mask(asked))

    @app.post(f"{_VERSION}/infer", include_in_schema=False)
    @app.post(
        f"{_MODEL}/infer",
        response_model=dict[str, Any],
        summary=f"Label texts, as tensors; {_ALSO}/infer",
        **openapi.described(InferRequest),
    )
    async def infer_model(name: str, request: Request) -> Response:
        if _BINARY in request.headers:
            raise RequestError(
                415, "Validation", "tensors are read as JSON here, not as binary data"
            )
        asked = await _read(request, InferRequest, service, untyped=True)
        request.scope[TEXTS] = sum(len(given.data) for given in asked.inputs)
        return JSONResponse(await open_inference.infer(service, name, _version(request), asked))


def _add_states(app: FastAPI, service: Service) -> None:
    """Add the routes that tell what is served, and whether it works."""
    closed, stuck = openapi.refused(401), openapi.refused(503)
    unknown = openapi.refused(401, 404)

    def ready() -> dict[str, bool]:
        try:
            service.check()
        except RuntimeError as error:
            raise RequestError(503, "Unhealthy", str(error)) from None
        return {"ready": True}

    @app.get("/health", responses=stuck, summary="Whether it works")
    @app.get("/health/ready", responses=stuck, summary="Whether it works")
    @app.get("/v2/health/ready", responses=stuck, summary="Whether it works")
    async def health_ready() -> dict[str, bool]:
        return ready()

    @app.get("/health/live", summary="Whether it runs")
    @app.get("/v2/health/live", summary="Whether it runs")
    async def health_live() -> dict[str, bool]:
        return {"live": True}

    for path in (*_OPEN, *_OPEN_V2):  # load balancers ask so
        if "health" in path:
            answer = health_live if path.endswith("live") else health_ready
            app.head(path, include_in_schema=False)(answer)

    @app.get("/info", responses=closed, summary="What is served")
    async def info() -> dict[str, Any]:
        return service.info()

    @app.get(
        "/metrics",
        responses=closed,
        response_class=PlainTextResponse,
        summary="Counters, for Prometheus",
    )
    async def metrics() -> str:
        return service.metrics.render()

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return HTMLResponse(docs_page.page(app.openapi()), headers=docs_page.HEADERS)

    @app.get("/v2", responses=closed, summary="The server's metadata")
    async def server() -> dict[str, Any]:
        return {"name": "raybert", "version": __version__, "extensions": []}

    @app.get(_VERSION, include_in_schema=False)
    @app.get(_MODEL, responses=unknown, summary=f"A model's metadata; {_ALSO}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        return open_inference.describe(open_inference.find(service, name, _version(request)))

    @app.get(f"{_VERSION}/ready", include_in_schema=False)
    @app.get(
        f"{_MODEL}/ready",
        responses=unknown | stuck,
        summary=f"Whether a model is there; {_ALSO}/ready",
    )
    async def model_ready(name: str, request: Request) -> dict[str, Any]:
        served = open_inference.find(service, name, _version(request))
        return {"name": served.name, **ready()}


def _add_page(app: FastAPI, page: Path | None) -> list[str]:
    """Serve a folder at `/`, a route a file; returns their paths.

    A folder that is mounted would answer for every path, and take GET /predict for a missing file.
    """
    if page is None or not page.joinpath("index.html").exists():
        return []
    files = (file.relative_to(page) for file in page.rglob("*") if file.is_file())
    paths = ["/", *(f"/{file.as_posix()}" for file in files)]
    served = StaticFiles(directory=page, html=True)
    app.router.routes.extend(Route(path, served, methods=["GET"]) for path in paths)
    return paths


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse(error.body, error.status, error.headers)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status, headers = error.status_code, dict(error.headers or {})
        told = str(error.detail)
        if status == 404:
            told = "there is nothing at this path; /docs names those that there are"
        elif status == 405:
            told = f"this path takes {headers.get('Allow', 'other methods')}; /docs says how"
        body = {"error": told, "error_type": _KINDS.get(status, "Validation")}
        return JSONResponse(body, status, headers)

    async def broken(request: Request, error: Exception) -> Response:
        body = {"error": "the server failed; its log says why", "error_type": "Internal"}
        return JSONResponse(body, 500)

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, broken)


async def _read(request: Request, model: type[B], service: Service, *, untyped: bool = False) -> B:
    """Read and parse a body of bounded size.

    Args:
        request: whose body is read.
        model: its form.
        service: whose limits hold.
        untyped: whether it may come without a Content-Type, as the Open Inference Protocol's
            clients send it.

    Raises:
        Refused: it is too large or too slow, no JSON, or of another form.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not (untyped and not content_type):
        raise RequestError(415, "Validation", "send JSON, with Content-Type: application/json")
    limit, seconds = 1024 * service.config.max_body_kb, service.config.timeout_s
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > limit:
        raise schemas.too_large(f"the body has more than {limit:,} bytes; send less at once")
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise schemas.too_large(
                        f"the body has more than {limit:,} bytes; send less at once"
                    )
                parts.append(part)
    except TimeoutError:
        message = f"the body did not come within {seconds:g} s"
        raise RequestError(408, "Timeout", message) from None
    except ClientDisconnect:
        raise RequestError(400, "Validation", "the body was cut short") from None
    return schemas.parse(model, b"".join(parts))


def _count(inputs: str | list[str]) -> int:
    return 1 if isinstance(inputs, str) else len(inputs)


def _version(request: Request) -> str | None:
    """The version that a path asks for."""
    found: str | None = request.path_params.get("version")
    return found
