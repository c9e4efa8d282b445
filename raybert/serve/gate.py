"""Before a request is read: who asks, and whether there is room; after it: one line in the log.

Plain ASGI, for it runs for every request. In an overload most of them end at the `Door`, which
`edge` asks before Serve spends anything on them. What the log gets is a route's pattern, never a
path, a query, a header or a text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raybert.serve.auth import Keys
from raybert.serve.bodies import Refused
from raybert.serve.service import Service

TEXTS = "raybert.texts"  # in the scope: how many texts the request had
_UNKNOWN = "-"
_QUEUED = ("/predict", "/infer")  # how paths end that want the queue


class Door:
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

    def refusal(self, scope: Scope) -> JSONResponse | None:
        """The answer to a request that is not let in; None: it is."""
        try:
            self._check(scope)
        except Refused as refused:
            return JSONResponse(refused.body, refused.status, refused.headers)
        return None

    def is_queued(self, scope: Scope) -> bool:
        """Whether a request will want the queue."""
        path: str = scope["path"]
        return scope["method"] == "POST" and path.endswith(_QUEUED)

    def _check(self, scope: Scope) -> None:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in self._open:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if not self._keys.allow(given[0] if given else None):
                raise Refused(
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


class Gate:
    """Middleware around the application."""

    def __init__(self, app: ASGIApp, *, door: Door) -> None:
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
        begun, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            answer = self._door.refusal(scope) or self._app
            await answer(scope, receive, noting)
        finally:
            self._door.note(scope, status, time.perf_counter() - begun)
