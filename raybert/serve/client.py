"""A small client for `raybert serve`, with nothing but the standard library.

    with Client("http://127.0.0.1:8000") as client:
        client.predict("A joy to watch.")   # [{"label": "pos", "score": 0.98}, ...]

Predictions may be asked for twice, so that what a busy or a restarting server could not answer is
asked again, after the pause that it asks for. What can't get better is raised at once, such as a
host that nobody knows or a certificate that does not hold; what took too long is sent once more.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

_AGAIN = frozenset({0, 408, 429, 500, 502, 503, 504})  # 0: no answer at all
_TOO_LONG, _MOST_TOO_LONG = 504, 2  # the dearest requests: a busy server is not given them forever
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds


class ServerError(Exception):
    """The server refused a request, or could not answer it; `status` is 0 where none came."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.message = status, message


class Client:
    """A connection to a server; not safe for threads, each of which takes its own."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout_s: float = 60,
        patience_s: float = 60,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            url: of the server: http or https.
            key: is sent as a bearer key.
            timeout_s: without a byte, after which a try is given up.
            patience_s: for which a request is tried again and again.
            context: for https, in place of the system's certificates.

        Raises:
            ValueError: that is no such URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: expected http://HOST:PORT")
        self._root, self._patience_s = parts.path.rstrip("/"), patience_s
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = context or ssl.create_default_context()
            self._connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_s, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(
                parts.hostname, parts.port, timeout=timeout_s
            )

    def predict(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Label one text or several.

        Args:
            texts: raw texts.
            options: truncate, raw_scores, all_scores, explain, model.

        Returns:
            For each text its labels with their scores, the likeliest first.

        Raises:
            ServerError: it is refused, or there is no answer within `patience_s`.
        """
        return self._post("/predict", texts, options)

    def fill_mask(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Guess each mask of one text, or of several; `top_k` guesses."""
        return self._post("/fill-mask", texts, options)

    def info(self) -> Any:
        """What is served."""
        return self._ask("GET", "/info", None)

    def ready(self) -> Any:
        """Wait until it works, for `patience_s` at most; asks without a key, too."""
        return self._ask("GET", "/health/ready", None)

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
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        deadline, pause, too_long = time.monotonic() + self._patience_s, _FIRST_PAUSE, 0
        while True:
            answer, wish = self._try(method, path, body)
            if not isinstance(answer, ServerError):
                return answer
            # Not all at once, where many wait for the same server.
            wait = max(wish, pause * random.uniform(0.5, 1.5))
            too_long += answer.status == _TOO_LONG
            is_hopeless = answer.status not in _AGAIN or too_long >= _MOST_TOO_LONG
            if is_hopeless or time.monotonic() + wait > deadline:
                raise answer
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _try(self, method: str, path: str, body: bytes | None) -> tuple[Any, float]:
        """One try: an answer, or a ServerError, and the seconds to wait at least; inf: for ever."""
        try:
            self._connection.request(method, self._root + path, body, self._headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next try opens it again
            silence = ServerError(0, f"no answer: {error or type(error).__name__}")
            return silence, math.inf if _is_lasting(error) else 0.0
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if response.status == 200 and answer is not None:
            return answer, 0.0
        told = answer.get("error") if isinstance(answer, dict) else None
        wish = response.headers.get("Retry-After", "")
        seconds = min(_LONGEST_PAUSE, float(wish)) if wish.isdecimal() else 0.0
        return ServerError(response.status, str(told or response.reason)), seconds


def _is_lasting(error: Exception) -> bool:
    """Whether another try would end the same: an unknown host, a certificate that does not hold."""
    if isinstance(error, socket.gaierror):
        return error.errno != socket.EAI_AGAIN  # the resolver does not answer just now
    return isinstance(error, ssl.SSLCertVerificationError)
