"""Request bodies: JSON only, validated, with one line about the first mistake.

FastAPI validates the parsed body against a route's parameter and documents it. A custom request
class reads the body, since FastAPI would accept more than JSON (UTF-16, lone surrogates, NaN) and
respond 422 to another content type. A model as parameter costs 1 µs of 118 for a small POST
/predict; a dependency per route would cost 130 µs, a validated response 50 (p50, one connection).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Self

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.responses import Response

from raybert.inference.classifier import Text
from raybert.serve import request_errors
from raybert.serve.http.compression import decompress
from raybert.serve.http.middleware import MAX_BYTES
from raybert.serve.request_errors import RequestError

_MAX_DESCRIBED_ERRORS = 100  # describing one takes 3 µs, and a megabyte can have 100,000
_TEXT_KEYS = (("inputs",), ("instances",))
_MAX_KEY_LENGTH = 60  # characters of an unknown key in a message


class JSONRequest(Request):
    """A request whose body is JSON."""

    async def body(self) -> bytes:
        """Read the body, decompressed, without a byte order mark."""
        if not hasattr(self, "_decoded"):
            encoding = self.headers.get("content-encoding")
            body = await super().body()
            if encoding is not None:
                body = await decompress(body, encoding, self.scope[MAX_BYTES])
            self._decoded = body.removeprefix(codecs.BOM_UTF8)
        return self._decoded

    async def json(self) -> Any:
        """Parse an object."""
        return parse_object(await self.body())


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object; RequestError: it is none. from_json limits the depth."""
    try:
        value = from_json(body)
    except ValueError as error:
        raise request_errors.bad_request(f"Invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise request_errors.invalid("the body: input should be an object")
    return value


class JSONRoute(APIRoute):
    """A route whose body, where it has one, is JSON."""

    request_class: type[JSONRequest] = JSONRequest

    def check_headers(self, headers: Headers) -> None:
        """Raise RequestError, 415, before a body is read that is not declared as JSON."""
        if content_type(headers) != "application/json":
            raise RequestError(415, "Validation", "send JSON, with Content-Type: application/json")

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler, which parses, validates and calls the endpoint."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_json(request: Request) -> Response:
            self.check_headers(request.headers)
            request = self.request_class(request.scope, request.receive)
            if not (await request.body()).strip():
                raise request_errors.bad_request("the request has no body; send JSON")
            return await handle(request)

        return read_json


def content_type(headers: Headers) -> str:
    """Return a request's media type without parameters, in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class ClosedModel(BaseModel):
    """Accepts neither unknown keys nor values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RequestBody(ClosedModel):
    """A request's body; a mistake in it raises RequestError with one line, without the input."""

    @model_validator(mode="wrap")
    @classmethod
    def _reject_in_one_line(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(value)
        except ValidationError as error:
            raise _describe(error, list(cls.model_fields)) from None


def _describe(error: ValidationError, keys: Sequence[str]) -> RequestError:
    """Describe the first mistake; of very many mistakes only their number."""
    known = ", ".join(keys)
    if error.error_count() > _MAX_DESCRIBED_ERRORS:
        return request_errors.invalid(f"{error.error_count():,} mistakes; known keys are {known}")
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    location, message = first["loc"], str(first["msg"])
    union_member = str(location[1]) if len(location) > 1 else ""
    if location[:1] in _TEXT_KEYS and union_member.startswith(("str", "list")):
        return request_errors.invalid(f"{location[0]}: give a text, or a list of texts")
    most = _MAX_KEY_LENGTH
    parts = (key if len(key) <= most else f"{key[:most]}..." for key in map(str, location))
    path = ".".join(parts) or "the body"
    if first["type"] == "extra_forbidden":
        return request_errors.invalid(f"unknown key {path}; known are {known}")
    return request_errors.invalid(f"{path}: {message[0].lower()}{message[1:]}")


def _unwrap(value: Any) -> Any:
    """Turn `[["a"], ["b"]]`, as text-embeddings-inference documents it, into `["a", "b"]`."""
    is_wrapped = isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 1 for item in value
    )
    return [text for [text] in value] if is_wrapped else value


_SingleText = Annotated[list[str], Field(min_length=1, max_length=1)]
_Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Texts = Annotated[
    str
    | Annotated[list[str], Field(fail_fast=True)]
    | Annotated[list[_Pair], Field(fail_fast=True)],
    Field(
        union_mode="left_to_right",
        description="a text, or a list of texts; each may be in a list of its own. For a model of "
        "pairs: two texts, or a list of such pairs",
        examples=["The plot was thin, but the actors made it a joy to watch."],
    ),
    BeforeValidator(
        _unwrap, json_schema_input_type=str | list[str] | list[_SingleText] | list[_Pair]
    ),
]
Inputs = str | list[str] | list[list[str]]


class Error(BaseModel):
    """Why a request was rejected."""

    error: str
    error_type: str


def check_texts(
    inputs: Inputs, max_texts: int, *, pairs: bool = False, key: str = "inputs"
) -> Sequence[Text]:
    """Return the texts of a request, or its pairs, as a list; or raise RequestError, 400 or 413.

    `key` is that of the texts in the body.
    """
    texts = _pairs_of(inputs, key) if pairs else _texts_of(inputs, key)
    if not texts:
        raise request_errors.empty(f"{key} is empty; give it a text")
    if len(texts) > max_texts:
        raise request_errors.too_large(
            f"{len(texts):,} texts are more than the {max_texts:,} that are read in a request"
        )
    for index, text in enumerate(texts):
        if not all(part.strip() for part in ((text,) if isinstance(text, str) else text)):
            place = key if len(texts) == 1 else f"{key}.{index}"
            raise request_errors.empty(f"{place} is empty; give it a text")
    return texts


def is_single(inputs: Inputs, *, pairs: bool) -> bool:
    """Return whether a request has one text, or one pair, that is not in a list of them."""
    if pairs:
        return isinstance(inputs, list) and all(isinstance(part, str) for part in inputs)
    return isinstance(inputs, str)


def _texts_of(inputs: Inputs, key: str) -> Sequence[str]:
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not all(isinstance(text, str) for text in texts):
        raise request_errors.invalid(f"{key}: give a text, or a list of texts")
    return [text for text in texts if isinstance(text, str)]


def _pairs_of(inputs: Inputs, key: str) -> Sequence[tuple[str, str]]:
    given: Sequence[Any] = [inputs] if is_single(inputs, pairs=True) and inputs else inputs
    pairs = [(item[0], item[1]) for item in given if isinstance(item, list) and len(item) == 2]
    if len(pairs) < len(given):
        raise request_errors.invalid(
            f'{key}: this model reads pairs of texts; give ["a", "b"], or a list of such pairs'
        )
    return pairs
