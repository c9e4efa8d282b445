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
import random
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_TIMED_OUT, _MAX_TIMED_OUT = 504, 2  # attempts: these requests cost a busy server most
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.1, 10.0

Text = str | Sequence[str]  # for a model of pairs: two texts
Response = tuple[int, Mapping[str, str] | http.client.HTTPMessage, bytes]  # status, headers, body
#: Sends a method, a path, headers and a body; OSError or HTTPException: there is no response.
Transport = Callable[[str, str, dict[str, str], bytes | None], Response]


class ServerError(Exception):
    """The server rejected a request or did not answer it; `status` is 0 without a response."""

    is_temporary = False  # whether the same request may succeed later
    retry_after_s = 0.0  # seconds that the server asks to wait

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.message = status, message


class NoAnswer(ServerError):
    """There is no response: the connection failed."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(0, f"no answer: {cause or type(cause).__name__}")
        self.is_temporary = not isinstance(cause, ssl.SSLCertVerificationError)
        if isinstance(cause, socket.gaierror):  # EAI_AGAIN: the resolver fails, not the host's name
            self.is_temporary = cause.errno == socket.EAI_AGAIN


class RequestRejected(ServerError):
    """The server does not accept the request, its key or its size, or has no such model."""


class ServerUnavailable(ServerError):
    """The server is overloaded, restarting or too slow; raised when retries have not helped."""

    is_temporary = True


class Client:
    """A connection to a server, not thread-safe; its methods raise a ServerError."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout_s: float = 60,
        retry_timeout_s: float = 60,
        context: ssl.SSLContext | None = None,
        transport: Transport | None = None,
        headers: Mapping[str, str] | None = None,
        patience_s: float | None = None,
    ) -> None:
        """Set up without connecting; ValueError: the URL or the key is invalid.

        Args:
            url: of the server, http or https.
            key: sent as a bearer key.
            timeout_s: time without a byte after which an attempt ends.
            retry_timeout_s: time for which a request is repeated.
            context: for https, in place of the system's certificates.
            headers: sent with every request, such as traceparent.
            transport: sends requests in place of a connection, for instance in tests.
            patience_s: deprecated name of `retry_timeout_s`.
        """
        if patience_s is not None:
            warnings.warn("patience_s is now retry_timeout_s", DeprecationWarning, stacklevel=2)
            retry_timeout_s = patience_s
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: expected http://HOST:PORT")
        self._root, self._retry_timeout_s = parts.path.rstrip("/"), retry_timeout_s
        self._headers = {**(headers or {}), "Content-Type": "application/json"}
        if key is not None:
            key = key.strip()  # a file ends with a line break
            if not all("!" <= character <= "~" for character in key):
                raise ValueError("key: it has other characters than printable ASCII")
            self._headers["Authorization"] = f"Bearer {key}"
        connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            context = context or ssl.create_default_context()
            connect = functools.partial(http.client.HTTPSConnection, context=context)
        self._connection = connect(parts.hostname, parts.port, timeout=timeout_s)
        self._transport = transport or self._send

    def predict(
        self,
        texts: Text | Sequence[Text],
        *,
        truncate: bool | None = None,
        raw_scores: bool | None = None,
        all_scores: bool | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        explain: bool | None = None,
        model: str | None = None,
    ) -> Any:
        """Return for each text its labels with their scores, or what else the model predicts.

        `texts` is a text or a list; for a model of pairs `("a", "b")` or a list of pairs. Options
        that are None are the server's: `truncate` cuts long texts, False reads them in windows;
        `raw_scores` are logits; `all_scores=False` leaves the predicted labels, `top_k` the best,
        `threshold` those above it; `explain` weighs words; `model` is one of several by name.
        """
        return self._post(
            "/predict",
            inputs=texts,
            truncate=truncate,
            raw_scores=raw_scores,
            all_scores=all_scores,
            top_k=top_k,
            threshold=threshold,
            explain=explain,
            model=model,
        )

    def fill_mask(self, texts: str | Sequence[str], *, top_k: int | None = None) -> Any:
        """Return the `top_k` most probable tokens for each mask of one text or several."""
        return self._post("/fill-mask", inputs=texts, top_k=top_k)

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

    def _post(self, path: str, **body: Any) -> Any:
        given = {key: value for key, value in body.items() if value is not None}
        return self._request("POST", path, json.dumps(given, default=list).encode("utf-8"))

    def _request(self, method: str, path: str, body: bytes | None) -> Any:
        deadline, pause_s, timed_out = time.monotonic() + self._retry_timeout_s, _MIN_PAUSE_S, 0
        while True:
            try:
                return self._attempt(method, path, body)
            except ServerError as error:
                # Random, so that many clients do not retry at the same time.
                wait_s = max(error.retry_after_s, pause_s * random.uniform(0.5, 1.5))
                timed_out += error.status == _TIMED_OUT
                is_last = timed_out >= _MAX_TIMED_OUT or time.monotonic() + wait_s > deadline
                if is_last or not error.is_temporary:
                    raise
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _attempt(self, method: str, path: str, body: bytes | None) -> Any:
        """Send a request once and return the answer."""
        try:
            status, headers, content = self._transport(
                method, self._root + path, self._headers, body
            )
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(error) from error
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if status == 200 and answer is not None:
            return answer
        message = answer.get("error") if isinstance(answer, dict) else None
        reason = "the response is not JSON" if status == 200 else http.client.responses.get(status)
        kind = ServerUnavailable if status in _RETRIED else RequestRejected
        failure = kind(status, str(message or reason))
        given = headers.get("Retry-After", "")
        if given.isdecimal():
            failure.retry_after_s = min(_MAX_PAUSE_S, float(given))
        raise failure

    def _send(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None
    ) -> Response:
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            return response.status, response.headers, response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()  # the next attempt opens it again
            raise
