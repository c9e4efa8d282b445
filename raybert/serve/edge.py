"""Before Ray Serve reads a request: headers that it would stumble over, at the sockets of Serve."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Utf8Headers:
    """Refuses headers that are not UTF-8: Serve decodes some of them, and would answer with 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "http":
            try:
                for name, value in scope["headers"]:
                    if not value.isascii():
                        value.decode("utf-8")
                    name.decode("ascii")
            except UnicodeDecodeError:
                body = {"error": "a header is not UTF-8", "error_type": "Validation"}
                await JSONResponse(body, 400)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Called by Ray Serve where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it."""
    return [Middleware(Utf8Headers)]
