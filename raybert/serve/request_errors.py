"""Errors in the form of text-embeddings-inference: a status and {"error", "error_type"}.

Serve's proxies and the configuration of HAProxy need them too: this module imports Starlette only.
"""

from __future__ import annotations

import functools
import math

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

QUEUE_FULL_HEADER = "x-raybert-full"  # on a replica's 429; HAProxy reads and removes it
READY_PATHS = ("/health", "/health/ready", "/v2/health/ready")
LIVE_PATHS = ("/health/live", "/v2/health/live")
HEALTH_PATHS = frozenset((*READY_PATHS, *LIVE_PATHS))
QUEUED_PATHS = (
    "/predict",
    "/infer",
    ":predict",
)  # ends of the paths whose requests enter a classifier's queue


class RequestError(HTTPException):
    """A request is rejected.

    An HTTPException, since FastAPI replaces other exceptions that are raised while it reads a body.
    """

    def __init__(
        self, status: int, error_type: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.error_type = error_type

    @property
    def body(self) -> dict[str, str]:
        """The response's body."""
        return {"error": self.detail, "error_type": self.error_type}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body, self.status_code, self.headers)


empty = functools.partial(RequestError, 400, "Empty")
bad_request = functools.partial(RequestError, 400, "Validation")  # it can't be read
not_found = functools.partial(RequestError, 404, "NotFound")  # no such model or path
too_large = functools.partial(RequestError, 413, "Validation")  # a limit is exceeded
invalid = functools.partial(RequestError, 422, "Validation")  # it lacks the expected form
not_tokenizable = functools.partial(RequestError, 422, "Tokenizer")


def overloaded(wait_s: float) -> RequestError:
    """429: the queue is full; it empties in about `wait_s` seconds."""
    seconds = max(1, math.ceil(wait_s))
    message = f"the server is busy; try again in {seconds} s"
    return RequestError(429, "Overloaded", message, {"Retry-After": str(seconds)})
