"""Before a request is read: who asks, and whether there is room; after it: one line in the log.

Plain ASGI, for it runs for every request. In an overload most of them end at the `Door`, which
`edge` asks before Serve spends anything on them: their answers are made once, and they share a line
in the log. What the log gets is a route's pattern, never a path, a query, a header or a text.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raybert.serve.http.authentication import Keys
from raybert.serve.http.schemas import FULL, QUEUED, RequestError
from raybert.serve.runtime.service import Service

TEXTS = "raybert.texts"  # in the scope: how many texts the request had
_UNKNOWN = "-"
_BUSY = 429
_GONE = 499  # as Serve counts those who did not wait for their answer
_TELL_S = 1.0  # between two lines of the log that tell of refusals


class RecordedSend:
    """A refusal in bytes, which may be sent again and again."""

    def __init__(self, status: int, body: dict[str, str], headers: dict[str, str]) -> None:
        made = JSONResponse(body, status, headers)
        self.status, self._headers, self._body = status, made.raw_headers, bytes(made.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        headers = list(self._headers)  # to which those who stand around may add their own
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


@functools.lru_cache(64)  # one for each number of seconds to wait
def _answer(
    status: int, kind: str, message: str, headers: tuple[tuple[str, str], ...]
) -> RecordedSend:
    told = dict(headers) | ({FULL: "1"} if status == _BUSY else {})
    return RecordedSend(status, {"error": message, "error_type": kind}, told)


class AdmissionControl:
    """Who may come in, and what is kept of those that did."""

    def __init__(
        self, service: Service, keys: Keys, open_paths: Collection[str], log: logging.Logger
    ) -> None:
        """Set up.

        Args:
            service: whose queue is looked at, and whose metrics are kept.
            keys: that are let in.
            open_paths: what may be asked for without a key.
            log: gets a record for each request, with its particulars in `extra`.
        """
        self._service, self._keys, self._log = service, keys, log
        self._open = frozenset(open_paths)
        self._busy, self._told = 0, -math.inf  # refusals that no line has told of; when one did

    def refusal(self, scope: Scope) -> RecordedSend | None:
        """The answer to a request that is not let in; None: it is."""
        try:
            self._check(scope)
        except RequestError as refused:
            headers = tuple(refused.headers.items())
            return _answer(refused.status, refused.kind, refused.message, headers)
        return None

    def is_queued(self, scope: Scope) -> bool:
        """Whether a request will want the queue."""
        path: str = scope["path"]
        return scope["method"] == "POST" and path.endswith(QUEUED)

    def _check(self, scope: Scope) -> None:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in self._open:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if not self._keys.allow(given[0] if given else None):
                raise RequestError(
                    401,
                    "Unauthorized",
                    "send a key of this server's: Authorization: Bearer KEY",
                    {"WWW-Authenticate": "Bearer"},
                )
        if self.is_queued(scope):
            self._service.check_queue()

    def note(self, scope: Scope, status: int, seconds: float) -> None:
        """Keep that a request was answered."""
        route = getattr(scope.get("route"), "path", _UNKNOWN)
        metrics = self._service.metrics
        metrics.add("requests_total", route=route, status=str(status))
        metrics.observe(route, seconds)
        if status == _BUSY:
            self._busy += 1
        else:
            self._log.info(
                "request",
                extra={
                    "http_method": scope["method"],
                    "http_route": route,
                    "http_status": status,
                    "milliseconds": round(1000 * seconds, 2),
                    "texts": scope.get(TEXTS, 0),
                },
            )
        self._tell_busy()

    def _tell_busy(self) -> None:
        """Tell of refusals for want of room: a line a second, with how many there were."""
        now = time.monotonic()
        if self._busy and now >= self._told + _TELL_S:
            self._log.info("refused", extra={"http_status": _BUSY, "requests": self._busy})
            self._busy, self._told = 0, now


class AccessMiddleware:
    """Middleware around the application."""

    def __init__(self, app: ASGIApp, *, door: AdmissionControl) -> None:
        """Wrap an application."""
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # nothing here speaks WebSocket
                await send({"type": "websocket.close", "code": 1000})
            return
        begun, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            answer: ASGIApp = self._door.refusal(scope) or self._app
            await answer(scope, receive, noting)
        except asyncio.CancelledError:
            status = status or _GONE
            raise
        finally:
            self._door.note(scope, status or 500, time.perf_counter() - begun)
