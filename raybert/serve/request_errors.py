"""Errors in the form of text-embeddings-inference: a status and {"error", "error_type"}.

Serve's proxies and the configuration of HAProxy need them too: this module imports Starlette only.
"""

from __future__ import annotations

import math

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

QUEUE_FULL_HEADER = "x-raybert-full"  # on a replica's 429; HAProxy reads and removes it
QUEUED_PATHS = ("/predict", "/infer")  # ends of the paths whose requests enter a classifier's queue


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


def empty(key: str) -> RequestError:
    """400: there is no text."""
    return RequestError(400, "Empty", f"{key} is empty; give it a text")


def bad_request(message: str) -> RequestError:
    """400: the request can't be read."""
    return RequestError(400, "Validation", message)


def not_found(message: str) -> RequestError:
    """404: there is no such model or path."""
    return RequestError(404, "NotFound", message)


def too_large(message: str) -> RequestError:
    """413: a limit of the request's size is exceeded."""
    return RequestError(413, "Validation", message)


def invalid(message: str) -> RequestError:
    """422: the body does not have the expected form."""
    return RequestError(422, "Validation", message)


def not_tokenizable(message: str) -> RequestError:
    """422: a text can't be tokenized as requested."""
    return RequestError(422, "Tokenizer", message)


def overloaded(wait_s: float) -> RequestError:
    """429: the queue is full; it empties in about `wait_s` seconds."""
    seconds = max(1, math.ceil(wait_s))
    message = f"the server is busy; try again in {seconds} s"
    return RequestError(429, "Overloaded", message, {"Retry-After": str(seconds)})
