"""A small client for `raybert serve`; it imports the standard library only.

    with Client("http://127.0.0.1:8000") as client:
        client.predict("A joy to watch.")   # [{"label": "pos", "score": 0.98}, ...]

Predictions are idempotent: a request that a busy or restarting server did not answer is sent again,
after the pause that Retry-After gives. A permanent error is raised at once, such as an unknown host
or an invalid certificate; a request that took too long is sent once more.
"""

from __future__ import annotations

import functools
import http.client
import json
import math
import random
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

_RETRIED = frozenset({0, 408, 429, 500, 502, 503, 504})  # 0: no response
_TIMED_OUT, _MAX_TIMED_OUT = 504, 2  # attempts: these requests cost a busy server most
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.1, 10.0


class ServerError(Exception):
    """The server rejected a request or did not answer it; `status` is 0 without a response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.message = status, message


class Client:
    """A connection to a server; not thread-safe: each thread needs its own."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout_s: float = 60,
        retry_timeout_s: float = 60,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Set up without connecting; ValueError: the URL is invalid.

        Args:
            url: of the server, http or https.
            key: sent as a bearer key.
            timeout_s: time without a byte after which an attempt ends.
            retry_timeout_s: time for which a request is repeated.
            context: for https, in place of the system's certificates.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: expected http://HOST:PORT")
        self._root, self._retry_timeout_s = parts.path.rstrip("/"), retry_timeout_s
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            context = context or ssl.create_default_context()
            connect = functools.partial(http.client.HTTPSConnection, context=context)
        self._connection = connect(parts.hostname, parts.port, timeout=timeout_s)

    def predict(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Return for each text its labels with their scores, the most probable first.

        Options: truncate, raw_scores, all_scores, explain, model. ServerError: the request is
        rejected, or not answered within `retry_timeout_s`.
        """
        return self._post("/predict", texts, options)

    def fill_mask(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Return the most probable tokens for each mask of one text or several; options: top_k."""
        return self._post("/fill-mask", texts, options)

    def info(self) -> Any:
        """Return the description of the models."""
        return self._request("GET", "/info", None)

    def ready(self) -> Any:
        """Wait until the server is ready, for `retry_timeout_s` at most; needs no key."""
        return self._request("GET", "/health/ready", None)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _post(self, path: str, texts: str | Sequence[str], options: dict[str, Any]) -> Any:
        inputs = texts if isinstance(texts, str) else list(texts)
        body = json.dumps({"inputs": inputs, **options}).encode("utf-8")
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: bytes | None) -> Any:
        deadline, pause_s, timed_out = time.monotonic() + self._retry_timeout_s, _MIN_PAUSE_S, 0
        while True:
            answer, retry_after_s = self._attempt(method, path, body)
            if not isinstance(answer, ServerError):
                return answer
            # Random, so that many clients do not retry at the same time.
            wait_s = max(retry_after_s, pause_s * random.uniform(0.5, 1.5))
            timed_out += answer.status == _TIMED_OUT
            is_permanent = answer.status not in _RETRIED or timed_out >= _MAX_TIMED_OUT
            if is_permanent or time.monotonic() + wait_s > deadline:
                raise answer
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _attempt(self, method: str, path: str, body: bytes | None) -> tuple[Any, float]:
        """Return an answer or a ServerError, and the seconds until a retry; inf: none."""
        try:
            self._connection.request(method, self._root + path, body, self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next attempt opens it again
            no_answer = ServerError(0, f"no answer: {error or type(error).__name__}")
            return no_answer, math.inf if _is_permanent(error) else 0.0
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if response.status == 200 and answer is not None:
            return answer, 0.0
        message = answer.get("error") if isinstance(answer, dict) else None
        given = response.headers.get("Retry-After", "")
        retry_after_s = min(_MAX_PAUSE_S, float(given)) if given.isdecimal() else 0.0
        return ServerError(response.status, str(message or response.reason)), retry_after_s


def _is_permanent(error: Exception) -> bool:
    """Return whether a retry would fail too: an unknown host, an invalid certificate."""
    if isinstance(error, socket.gaierror):
        return error.errno != socket.EAI_AGAIN  # EAI_AGAIN: a temporary failure of the resolver
    return isinstance(error, ssl.SSLCertVerificationError)
