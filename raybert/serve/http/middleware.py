"""The middleware of POST /predict and all other paths, in the order in which a request meets it.

1. LoadSheddingMiddleware, in front of Ray Serve: rejects headers that are not UTF-8 (400). In a
   replica that HAProxy connects to, unless `serve.cors` is set, it also checks the key and the
   queue of a prediction, since Serve's own work takes several times longer than a rejection.
2. CORSMiddleware of Starlette, if `serve.cors` is set.
3. AccessMiddleware: checks Host, the key and the queue, and records the request in log and metrics.
4. BodyLimitMiddleware: limits the bytes of a body and the seconds in which it must arrive.

The log gets a route's pattern, and never a path, a query, a header or a text. Serve's proxies
import this module: it is plain ASGI and does not import PyTorch.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import re
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raybert.serve import request_errors
from raybert.serve.http.authentication import Keys
from raybert.serve.http.hosts import host_name, is_allowed_host
from raybert.serve.request_errors import (
    HEALTH_PATHS,
    QUEUE_FULL_HEADER,
    QUEUED_PATHS,
    RequestError,
)

if TYPE_CHECKING:
    from raybert.serve.runtime.service import Service
    from raybert.serve.settings import ServeConfig

MAX_BYTES = "raybert.max_bytes"  # key in the scope: of a body, also once it is decompressed
TEXT_COUNT = "raybert.text_count"  # key in the scope: texts of the request
_NO_ROUTE = "-"
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_TOO_MANY_REQUESTS = 429
_CLIENT_CLOSED_REQUEST = 499  # as Serve counts clients that did not wait
_LOG_INTERVAL_S = 1.0  # between two log lines about rejections by a full queue


def middlewares() -> list[Middleware]:
    """The middleware in front of Serve; `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names this."""
    return [Middleware(LoadSheddingMiddleware)]


def application_middleware(config: ServeConfig, admission: AdmissionControl) -> list[Middleware]:
    """The middleware of the application."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.cors,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "Traceparent", "Tracestate"],
        expose_headers=["Retry-After"],
    )
    return [
        *([cors] if config.cors else []),
        Middleware(AccessMiddleware, admission=admission, root_path=config.root_path),
        Middleware(
            BodyLimitMiddleware, max_bytes=1024 * config.max_body_kb, timeout_s=config.timeout_s
        ),
    ]


class CachedResponse:
    """A response as bytes, which can be sent any number of times."""

    def __init__(self, response: JSONResponse) -> None:
        self.status = response.status_code
        self._headers, self._body = response.raw_headers, bytes(response.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        headers = list(self._headers)  # a copy, since middleware may append to it
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


@functools.lru_cache(64)  # one for each number of seconds in Retry-After
def _cached_response(
    status: int, error_type: str, message: str, headers: tuple[tuple[str, str], ...]
) -> CachedResponse:
    marked = dict(headers)
    if status == _TOO_MANY_REQUESTS:
        marked[QUEUE_FULL_HEADER] = "1"
    return CachedResponse(RequestError(status, error_type, message, marked).response())


class AdmissionControl:
    """Checks keys and the queue of one replica; records requests in its log and metrics."""

    def __init__(
        self, service: Service, keys: Keys, open_paths: Collection[str], log: logging.Logger
    ) -> None:
        """Set up; GET of `open_paths` needs no key, and `log` gets a record for each request."""
        self._service, self._keys, self._log = service, keys, log
        self._open_paths = frozenset(open_paths)
        self._root_path = service.config.root_path
        hosts = service.config.allowed_hosts
        self._is_known: Callable[[bytes], bool] | None = None
        if hosts is not None:
            allowed = frozenset(map(host_name, hosts))
            self._is_known = functools.lru_cache(64)(
                lambda host: is_allowed_host(host.decode("latin-1"), allowed)
            )
        self._unlogged, self._logged_at = 0, -math.inf  # rejections by a full queue

    def reject(self, scope: Scope) -> CachedResponse | None:
        """Return the response to a request that is rejected; None: it is accepted."""
        try:
            self._check(scope)
        except RequestError as error:
            headers = tuple((error.headers or {}).items())
            return _cached_response(error.status_code, error.error_type, error.detail, headers)
        return None

    def is_queued(self, scope: Scope) -> bool:
        """Return whether a request will enter the queue of a classifier."""
        path = self._path(scope)
        return scope["method"] == "POST" and (path.endswith(QUEUED_PATHS) or path == "/")

    def _path(self, scope: Scope) -> str:
        """Return a request's path below the root path, which the proxy may have removed."""
        path: str = scope["path"]
        root = self._root_path
        if root and path == root:
            return "/"
        return path.removeprefix(root) if path.startswith(f"{root}/") else path

    def _check(self, scope: Scope) -> None:
        path = self._path(scope)
        if not path.isprintable():  # Starlette takes /predict%0A for /predict
            raise request_errors.not_found("a path has no control characters")
        if path in HEALTH_PATHS:  # checks of load balancers name any host
            return
        if self._is_known is not None:
            for name, value in scope["headers"]:
                if name == b"host" and not self._is_known(value):
                    raise request_errors.bad_request(
                        "this server is not known by the name in Host; serve.allowed_hosts adds "
                        "names"
                    )
        if path not in self._open_paths or scope["method"] not in ("GET", "HEAD"):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if not self._keys.allow(given[0] if given else None):
                raise RequestError(
                    401,
                    "Unauthorized",
                    "send a key of this server's: Authorization: Bearer KEY",
                    {"WWW-Authenticate": "Bearer"},
                )
        if self.is_queued(scope):
            wait_s = self._service.full_for_s(_content_length(scope))
            if wait_s is not None:
                raise request_errors.overloaded(wait_s)

    def record(self, scope: Scope, status: int, begun: float, trace: bytes | None = None) -> None:
        """Count and log a request that began at `begun` of `time.perf_counter`.

        The log has the id of its trace, the second part of a traceparent.
        """
        seconds = time.perf_counter() - begun
        route = getattr(scope.get("route"), "path", _NO_ROUTE)
        metrics = self._service.metrics
        metrics.add("requests_total", route=route, status=str(status))
        metrics.observe(route, seconds)
        if status == _TOO_MANY_REQUESTS:
            self._unlogged += 1
        else:
            self._log.info(
                "request",
                extra={
                    "http_method": scope["method"],
                    "http_route": route,
                    "http_status": status,
                    "milliseconds": round(1000 * seconds, 2),
                    "texts": scope.get(TEXT_COUNT, 0),
                    **({"trace_id": trace.split(b"-")[1].decode()} if trace else {}),
                },
            )
        now = time.monotonic()
        if self._unlogged and now >= self._logged_at + _LOG_INTERVAL_S:
            extra = {"http_status": _TOO_MANY_REQUESTS, "requests": self._unlogged}
            self._log.info("refused", extra=extra)
            self._unlogged, self._logged_at = 0, now


_admission: AdmissionControl | None = None  # of the replica in this process


def set_admission(admission: AdmissionControl) -> None:
    """Let LoadSheddingMiddleware use a replica's AdmissionControl; Serve's proxies have none."""
    global _admission
    _admission = admission


class LoadSheddingMiddleware:
    """Rejects headers to which Serve would respond 500 and, after `set_admission`, as `reject`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http":
            begun = time.perf_counter()
            if not _has_utf8_headers(scope):
                error = request_errors.bad_request("a header is not UTF-8")
                await error.response()(scope, receive, send)
                return
            if _admission is not None and _admission.is_queued(scope):
                rejection = _admission.reject(scope)
                if rejection is not None:
                    await rejection(scope, receive, send)
                    _admission.record(scope, rejection.status, begun)
                    return
        await self._app(scope, receive, send)


def _has_utf8_headers(scope: Scope) -> bool:
    try:
        for name, value in scope["headers"]:
            if not value.isascii():
                value.decode("utf-8")
            name.decode("ascii")
    except UnicodeDecodeError:
        return False
    return True


class AccessMiddleware:
    """Rejects or passes on each request to the application, and records it."""

    def __init__(self, app: ASGIApp, *, admission: AdmissionControl, root_path: str = "") -> None:
        self._app, self._admission, self._root_path = app, admission, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # WebSockets are not supported
                await send({"type": "websocket.close", "code": 1000})
            return
        begun, status = time.perf_counter(), 0
        if self._root_path:  # which a proxy may have removed from the path, or not
            scope["root_path"] = self._root_path
            if scope["path"] == self._root_path:  # without its last slash
                scope["path"] += "/"
        trace = _traceparent(scope)

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if trace is not None:
                    message["headers"] = [*message["headers"], (b"traceparent", trace)]
            await send(message)

        try:
            handler: ASGIApp = self._admission.reject(scope) or self._app
            await handler(scope, receive, send_noting_status)
        except asyncio.CancelledError:
            status = status or _CLIENT_CLOSED_REQUEST
            raise
        finally:
            self._admission.record(scope, status or 500, begun, trace)


def _traceparent(scope: Scope) -> bytes | None:
    """Return the trace that a request belongs to (W3C Trace Context); None: it names none."""
    for name, value in scope["headers"]:
        if name == b"traceparent":
            return bytes(value) if _TRACEPARENT.fullmatch(value) else None
    return None


class BodyLimitMiddleware:
    """Makes reading a body raise RequestError: 400 cut short, 408 too slow, or 413 too large."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size, complete = 0, False
        deadline: float | None = None

        async def limited() -> Message:
            nonlocal size, deadline, complete
            if complete:
                return await receive()
            if deadline is None:
                deadline = asyncio.get_running_loop().time() + self._timeout_s
                self._check(_content_length(scope))
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body did not come within {self._timeout_s:g} s"
                raise RequestError(408, "Timeout", late) from None
            if message["type"] == "http.disconnect":
                raise request_errors.bad_request("the body was cut short")
            size += len(message.get("body", b""))
            self._check(size)
            complete = not message.get("more_body", False)
            return message

        scope[MAX_BYTES] = self._max_bytes
        await self._app(scope, limited, send)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise request_errors.too_large(
                f"the body has more than {self._max_bytes:,} bytes; send less at once"
            )


def _content_length(scope: Scope) -> int:
    """Return the declared length; 0 where there is none or it is no number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
