"""Before Ray Serve reads a request, at its sockets: what would trip it, and what is too much.

Serve's own bookkeeping for a request costs a multiple of refusing it: in an overload the difference
is what is left for the requests that are answered.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:  # proxies import this module, too, and need no PyTorch
    from raybert.serve.http.middleware import AdmissionControl

_door: AdmissionControl | None = None  # of the replica in this process


def set_admission(door: AdmissionControl) -> None:
    """Put a replica's door before Serve."""
    global _door
    _door = door


class LoadSheddingMiddleware:
    """Refuses headers that are not UTF-8, which Serve would answer with 500, and a full queue."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "http":
            begun = time.perf_counter()
            if not _is_readable(scope):
                body = {"error": "a header is not UTF-8", "error_type": "Validation"}
                await JSONResponse(body, 400)(scope, receive, send)
                return
            if _door is not None and _door.is_queued(scope):
                answer = _door.refusal(scope)
                if answer is not None:
                    await answer(scope, receive, send)
                    _door.note(scope, answer.status, time.perf_counter() - begun)
                    return
        await self._app(scope, receive, send)


def _is_readable(scope: Scope) -> bool:
    try:
        for name, value in scope["headers"]:
            if not value.isascii():
                value.decode("utf-8")
            name.decode("ascii")
    except UnicodeDecodeError:
        return False
    return True


def middlewares() -> list[Middleware]:
    """Called by Ray Serve where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it."""
    return [Middleware(LoadSheddingMiddleware)]
