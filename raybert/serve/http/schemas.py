"""Request and response bodies, in the forms of text-embeddings-inference and Open Inference v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from raybert.serve import request_errors
from raybert.serve.request_errors import RequestError

_MAX_DESCRIBED_ERRORS = 100  # describing one takes 3 µs, and a megabyte can have 100,000
_MAX_KEY_LENGTH = 60  # characters of an unknown key in a message


class _Closed(BaseModel):
    """Accepts neither unknown keys nor values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RequestBody(_Closed):
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
    if location[:1] == ("inputs",) and union_member.startswith(("str", "list")):
        return request_errors.invalid("inputs: give a text, or a list of texts")
    path = ".".join(_shorten(str(part)) for part in location) or "the body"
    if first["type"] == "extra_forbidden":
        return request_errors.invalid(f"unknown key {path}; known are {known}")
    return request_errors.invalid(f"{path}: {message[0].lower()}{message[1:]}")


def _shorten(key: str) -> str:
    return key if len(key) <= _MAX_KEY_LENGTH else f"{key[:_MAX_KEY_LENGTH]}..."


def _unwrap(value: Any) -> Any:
    """Turn `[["a"], ["b"]]`, as text-embeddings-inference documents it, into `["a", "b"]`."""
    is_wrapped = isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 1 for item in value
    )
    return [text for [text] in value] if is_wrapped else value


def _flatten(value: Any) -> Any:
    """Return a tensor's elements in order; the protocol allows lists nested as its shape is."""
    while isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        value = [inner for item in value for inner in item]
    return value


_SingleText = Annotated[list[str], Field(min_length=1, max_length=1)]
Texts = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)],
    Field(
        union_mode="left_to_right",
        description="a text, or a list of texts; each may be in a list of its own",
        examples=["The plot was thin, but the actors made it a joy to watch."],
    ),
    BeforeValidator(_unwrap, json_schema_input_type=str | list[str] | list[_SingleText]),
]


class PredictRequest(RequestBody):
    """Texts to classify."""

    inputs: Texts
    truncate: bool | None = Field(
        None,
        description="true: a text past the model's length loses its middle, as in training; false: "
        "it is read in windows whose scores are averaged; null: as the server is configured",
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = Field(
        None,
        description="accepted for text-embeddings-inference's clients and ignored: truncation "
        "removes the middle",
    )
    parameters: dict[str, Any] | None = Field(
        None, max_length=0, description="accepted, when empty, for huggingface_hub's client"
    )
    raw_scores: bool = Field(False, description="logits in place of probabilities")
    all_scores: bool = Field(
        True, description="all labels, the likeliest first; false: only the likeliest"
    )
    explain: bool = Field(False, description="add a weight for each word")
    model: str | None = Field(
        None, description="name of the model, where several are served; null: the first"
    )


class FillMaskRequest(RequestBody):
    """Texts with masks to fill."""

    inputs: Texts
    top_k: int = Field(5, ge=1, le=100, description="predictions for each mask")


class InferInput(_Closed):
    """A tensor of the Open Inference Protocol: texts."""

    name: str = "text"
    # Bounded, since the product of its elements is computed.
    shape: Annotated[list[int], Field(fail_fast=True, max_length=8)]
    datatype: Literal["BYTES"]
    data: Annotated[
        list[str],
        Field(fail_fast=True, description="the texts, flat or nested as the shape is"),
        BeforeValidator(_flatten, json_schema_input_type=list[Any]),
    ]
    parameters: dict[str, Any] | None = None


class InferOutput(_Closed):
    """A requested output."""

    name: str = Field(description="label or scores")
    parameters: dict[str, Any] | None = None


class InferRequest(RequestBody):
    """A request of the Open Inference Protocol, version 2."""

    id: str | None = Field(None, max_length=256)
    inputs: Annotated[list[InferInput], Field(fail_fast=True, max_length=1)]
    # Bounded: each output is sent in full, and a small request would get a large response.
    outputs: Annotated[list[InferOutput], Field(fail_fast=True, max_length=2)] | None = None
    parameters: dict[str, Any] | None = Field(None, description="truncate: as in PredictRequest")


class Score(BaseModel):
    """A label with its probability."""

    label: str
    score: float


class WordWeight(BaseModel):
    """A word, its position in the text in characters, and its weight."""

    text: str
    start: int
    end: int
    weight: float = Field(description="positive: it supports the likeliest label")


class Explained(BaseModel):
    """Scores with the weights of words."""

    predictions: list[Score] = Field(description="the likeliest first")
    words: list[WordWeight] = Field(description="in the order of the text")
    error: float = Field(
        description="difference between the sum of the weights and the decision: the likeliest "
        "label's logit over the mean of the others, less the same for the text with all words "
        "masked"
    )


class TokenScore(BaseModel):
    """A token with its probability in place of a mask."""

    token_str: str
    score: float


class Error(BaseModel):
    """Why a request was rejected."""

    error: str
    error_type: str


def check_texts(inputs: str | Sequence[str], max_texts: int) -> Sequence[str]:
    """Return the texts of a request as a list.

    Raises:
        RequestError: 400, there is none or one is empty; 413, there are too many.
    """
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not texts:
        raise request_errors.empty("inputs")
    if len(texts) > max_texts:
        raise request_errors.too_large(
            f"{len(texts):,} texts are more than the {max_texts:,} that are read in a request"
        )
    for index, text in enumerate(texts):
        if not text.strip():
            raise request_errors.empty("inputs" if len(texts) == 1 else f"inputs.{index}")
    return texts
