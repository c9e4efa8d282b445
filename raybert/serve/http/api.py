"""The FastAPI application of a replica: routes, middleware, exception handlers and the page.

`/predict` and `/fill-mask` have text-embeddings-inference's form, `/v2` the Open Inference
Protocol's. Every error is {"error", "error_type"} with a status of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from raybert import __version__
from raybert.errors import DataError
from raybert.serve import request_errors
from raybert.serve.http.admission import AccessMiddleware, AdmissionControl
from raybert.serve.http.authentication import Keys
from raybert.serve.http.json_route import BodyLimitMiddleware, JSONRoute
from raybert.serve.http.open_inference import add_open_inference_routes
from raybert.serve.http.openapi import openapi
from raybert.serve.http.server_routes import OPEN_PATHS, add_server_routes
from raybert.serve.http.text_routes import add_text_routes
from raybert.serve.request_errors import RequestError
from raybert.serve.runtime import replica_log
from raybert.serve.runtime.batching import ModelFailed, Overloaded
from raybert.serve.runtime.service import Service

PAGE = Path(__file__).with_name("page")


def make_api(
    service: Service, keys: Keys, *, log: logging.Logger, page: Path | None = PAGE
) -> FastAPI:
    """Make the application.

    Args:
        service: has loaded its models.
        keys: that are accepted.
        log: gets a record for each request.
        page: a folder whose files are served at `/`; None, or without index.html: no page.
    """

    @asynccontextmanager
    async def background_tasks(app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(service.models.watch()),
            asyncio.create_task(replica_log.flush_regularly(log)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    app = FastAPI(
        lifespan=background_tasks,
        title="raybert",
        version=__version__,
        docs_url=None,  # FastAPI's page loads scripts from a public address
        redoc_url=None,
        redirect_slashes=False,  # to an address that a proxy in front may not know
        strict_content_type=False,  # JSONRoute checks it before the body is read
        swagger_ui_oauth2_redirect_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.router.route_class = JSONRoute
    add_text_routes(app, service)
    add_open_inference_routes(app, service)
    add_server_routes(app, service)
    page_paths = _add_page(app, page)
    _add_exception_handlers(app, service, log)
    app.state.admission = AdmissionControl(service, keys, [*OPEN_PATHS, *page_paths], log)
    config = service.config
    app.add_middleware(
        BodyLimitMiddleware, max_bytes=1024 * config.max_body_kb, timeout_s=config.timeout_s
    )
    app.add_middleware(AccessMiddleware, admission=app.state.admission)
    if config.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    return app


def _add_page(app: FastAPI, page: Path | None) -> list[str]:
    """Serve a folder at `/`, one route per file; return the paths.

    A mounted folder would match every path, and answer GET /predict with 404 in place of 405.
    """
    if page is None or not page.joinpath("index.html").exists():
        return []
    files = (file.relative_to(page) for file in page.rglob("*") if file.is_file())
    paths = ["/", *(f"/{file.as_posix()}" for file in files)]
    static = StaticFiles(directory=page, html=True)
    app.router.routes.extend(Route(path, static, methods=["GET"]) for path in paths)
    return paths


def _add_exception_handlers(app: FastAPI, service: Service, log: logging.Logger) -> None:
    """Turn exceptions into error responses."""

    @app.exception_handler(RequestError)
    async def rejected(request: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        return request_errors.overloaded(error.wait_s).response()

    @app.exception_handler(TimeoutError)
    async def timed_out(request: Request, error: TimeoutError) -> Response:
        return request_errors.timed_out(service.config.timeout_s).response()

    @app.exception_handler(DataError)  # of a text with masks
    async def not_tokenizable(request: Request, error: DataError) -> Response:
        return request_errors.not_tokenizable(str(error)).response()

    @app.exception_handler(ModelFailed)
    async def model_failed(request: Request, error: ModelFailed) -> Response:
        log.error("%s", error, exc_info=error.__cause__)
        return request_errors.model_failed().response()

    @app.exception_handler(HTTPException)  # of Starlette's router
    async def no_route(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            message = "there is nothing at this path; /docs lists the paths that exist"
            return request_errors.not_found(message).response()
        message, error_type = str(error.detail), "Validation"
        if error.status_code == 405:
            error_type = "MethodNotAllowed"
            message = f"this path takes {headers.get('Allow', 'other methods')}; see /docs"
        return RequestError(error.status_code, error_type, message, headers).response()

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> Response:
        body = {"error": "the server failed; its log says why", "error_type": "Internal"}
        return JSONResponse(body, 500)
