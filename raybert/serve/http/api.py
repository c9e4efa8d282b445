"""The FastAPI application of a replica: routes, middleware, exception handlers and the page.

`/predict` and `/fill-mask` have text-embeddings-inference's form, `/v2` the Open Inference
Protocol's. Every error is {"error", "error_type"} with a status of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from raybert import __version__
from raybert.errors import DataError
from raybert.serve import request_errors
from raybert.serve.http.authentication import Keys
from raybert.serve.http.hub_routes import add_hub_routes
from raybert.serve.http.json_route import JSONRoute
from raybert.serve.http.kserve_v1 import add_kserve_v1_routes
from raybert.serve.http.middleware import AdmissionControl, application_middleware
from raybert.serve.http.open_inference import add_open_inference_routes
from raybert.serve.http.openapi import openapi
from raybert.serve.http.server_routes import OPEN_PATHS, add_server_routes
from raybert.serve.http.text_routes import add_text_routes
from raybert.serve.http.triton_routes import add_triton_routes
from raybert.serve.request_errors import RequestError
from raybert.serve.runtime.batching import ModelFailed, Overloaded
from raybert.serve.runtime.service import Service

PAGE = Path(__file__).with_name("page")
#: Serve buffers a thousand log lines in memory, and loses them at the end. The buffer saves a write
#: per request; a write per second costs no more, and keeps the log current.
FLUSH_INTERVAL_S = 1.0


def make_api(
    service: Service,
    keys: Keys,
    *,
    log: logging.Logger,
    page: Path | None = PAGE,
    metrics_of_all: Callable[[], Awaitable[str]] | None = None,
) -> FastAPI:
    """Make the application of a service that has loaded its models.

    `log` gets a record for each request. The files of the folder `page` are served at `/`, unless
    it is None or has no index.html. `metrics_of_all` returns the metrics of all replicas; None:
    there is one.
    """
    page_routes = _page_routes(page, service.config.root_path)
    open_paths = [*OPEN_PATHS, *(route.path for route in page_routes)]
    admission = AdmissionControl(service, keys, open_paths, log)

    @asynccontextmanager
    async def background_tasks(app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(service.models.watch()),
            asyncio.create_task(flush_regularly(log)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    app = FastAPI(
        lifespan=background_tasks,
        middleware=application_middleware(service.config, admission),
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
    add_hub_routes(app, service)
    add_triton_routes(app, service)
    add_kserve_v1_routes(app, service)
    add_open_inference_routes(app, service)
    add_server_routes(app, service, metrics_of_all)
    app.router.routes.extend(page_routes)
    _add_exception_handlers(app, service, log)
    app.state.admission = admission
    app.openapi = lambda: openapi(app, service.config.root_path)  # type: ignore[method-assign]
    return app


def _page_routes(page: Path | None, root_path: str) -> list[Route]:
    """Return a route for each file of a folder.

    A mounted folder would match every path, and answer GET /predict with 404 in place of 405.
    """
    if page is None or not page.joinpath("index.html").exists():
        return []
    files = (file.relative_to(page) for file in page.rglob("*") if file.is_file())
    static = StaticFiles(directory=page, html=True)
    routes = [Route(f"/{file.as_posix()}", static, methods=["GET"]) for file in files]
    if not root_path:
        return [Route("/", static, methods=["GET"]), *routes]
    # Without its last slash, an address would have the page's files beside it.
    text = (page / "index.html").read_text(encoding="utf-8")
    text = text.replace("<head>", f'<head>\n  <base href="{root_path}/">')
    answer = HTMLResponse(text.replace("base-uri 'none'", "base-uri 'self'"))

    async def index(request: Request) -> Response:
        return answer

    return [Route("/", index, methods=["GET"]), *routes]


def flush(log: logging.Logger) -> None:
    """Write what the log's handlers have buffered."""
    for handler in log.handlers:
        handler.flush()


async def flush_regularly(log: logging.Logger) -> None:
    """Flush a log every FLUSH_INTERVAL_S, and when this task is cancelled."""
    try:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            flush(log)
    finally:
        flush(log)


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
        message = f"no answer within {service.config.timeout_s:g} s; shorten the request"
        return RequestError(504, "Timeout", message).response()

    @app.exception_handler(DataError)  # of a text with masks
    async def not_tokenizable(request: Request, error: DataError) -> Response:
        return request_errors.not_tokenizable(str(error)).response()

    @app.exception_handler(ModelFailed)
    async def model_failed(request: Request, error: ModelFailed) -> Response:
        log.error("%s", error, exc_info=error.__cause__)
        message = "the model failed on this request; the server's log says why"
        return RequestError(424, "Backend", message).response()

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
