"""What requests may say, and what is answered where one can't be: text-embeddings-inference's form.

Bodies are parsed from bytes in one step: what is no valid JSON, no UTF-8 or too deep is refused
there. What is refused is told in a line without the input.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

FULL = "x-raybert-full"  # the header of a replica's refusals while its queue is full
QUEUED = ("/predict", "/infer")  # how the paths end of what wants the queue
_MOST_MISTAKES = 100  # of a body that are looked at: each takes time, and a megabyte has 100,000
_MOST_SHOWN = 60  # characters of a key that nobody knows


class RequestError(Exception):
    """A request that is not answered: a status, and a line that says why."""

    def __init__(
        self, status: int, kind: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, str]:
        """What is answered."""
        return {"error": self.message, "error_type": self.kind}


def empty(what: str) -> RequestError:
    """There is nothing to read."""
    return RequestError(400, "Empty", f"{what} is empty; give it a text")


def too_large(message: str) -> RequestError:
    """There is more than is taken at once."""
    return RequestError(413, "Validation", message)


def invalid(message: str) -> RequestError:
    """It has another form than asked for."""
    return RequestError(422, "Validation", message)


def unreadable(message: str) -> RequestError:
    """The text can't be turned into tokens as asked."""
    return RequestError(422, "Tokenizer", message)


def not_found(message: str) -> RequestError:
    """There is no such thing here."""
    return RequestError(404, "NotFound", message)


def overloaded(wait_s: float) -> RequestError:
    """Too much waits already."""
    seconds = max(1, math.ceil(wait_s))
    message = f"the server is busy; try again in {seconds} s"
    return RequestError(429, "Overloaded", message, {"Retry-After": str(seconds)})


def timed_out(seconds: float) -> RequestError:
    """The answer took too long."""
    return RequestError(504, "Timeout", f"no answer within {seconds:g} s; shorten the request")


def failed() -> RequestError:
    """The model could not compute it."""
    return RequestError(
        424, "Backend", "the model failed on this request; the server's log says why"
    )


class Body(BaseModel):
    """A request's body: closed to keys that it does not know, and to values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _unwrapped(given: Any) -> Any:
    """Several texts as text-embeddings-inference asks for them, each in a list of its own."""
    is_wrapped = isinstance(given, list) and all(
        isinstance(one, list) and len(one) == 1 for one in given
    )
    return [text for [text] in given] if is_wrapped else given


def _flat(given: Any) -> Any:
    """A tensor's elements in their order: the protocol lets lists be nested as its shape is."""
    while isinstance(given, list) and given and all(isinstance(one, list) for one in given):
        given = [inner for one in given for inner in one]
    return given


_Alone = Annotated[list[str], Field(min_length=1, max_length=1)]
Texts = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)],
    Field(
        union_mode="left_to_right",
        description="a text, or several, each alone or in a list of its own",
        examples=["The plot was thin, but the actors made it a joy to watch."],
    ),
    BeforeValidator(_unwrapped, json_schema_input_type=str | list[str] | list[_Alone]),
]


class PredictRequest(Body):
    """Texts to label."""

    inputs: Texts
    truncate: bool | None = Field(
        None,
        description="true: a text past the model's length loses its middle, as in training; false: "
        "it is read in windows and their scores are averaged; null: as the server is set",
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = Field(
        None,
        description="as text-embeddings-inference's clients send it; without effect, for what is "
        "cut is the middle",
    )
    parameters: dict[str, Any] | None = Field(
        None, max_length=0, description="as huggingface_hub's client sends it: with nothing in it"
    )
    raw_scores: bool = Field(False, description="logits in place of probabilities")
    all_scores: bool = Field(True, description="all labels, the likeliest first; false: that one")
    explain: bool = Field(False, description="a weight for each word, too")
    model: str | None = Field(None, description="which, where several are served; null: the first")


class FillMaskRequest(Body):
    """Texts with masks to fill in."""

    inputs: Texts
    top_k: int = Field(5, ge=1, le=100, description="guesses for each mask")


class InferInput(Body):
    """A tensor of the Open Inference Protocol: texts."""

    name: str = "text"
    # Its product is formed, which of a megabyte of factors would take seconds.
    shape: Annotated[list[int], Field(fail_fast=True, max_length=8)]
    datatype: Literal["BYTES"]
    data: Annotated[
        list[str],
        Field(fail_fast=True, description="the texts, flat or nested as the shape is"),
        BeforeValidator(_flat, json_schema_input_type=list[Any]),
    ]
    parameters: dict[str, Any] | None = None


class InferOutput(Body):
    """An output that is asked for."""

    name: str = Field(description="label or scores")
    parameters: dict[str, Any] | None = None


class InferRequest(Body):
    """A request of the Open Inference Protocol, version 2."""

    id: str | None = Field(None, max_length=256)
    inputs: Annotated[list[InferInput], Field(fail_fast=True, max_length=1)]
    # Each is answered in full: many would make a small request a large answer.
    outputs: Annotated[list[InferOutput], Field(fail_fast=True, max_length=2)] | None = None
    parameters: dict[str, Any] | None = Field(None, description="truncate: as in PredictRequest")


class Score(BaseModel):
    """A label and how likely it is."""

    label: str
    score: float


class WeighedWord(BaseModel):
    """A word, where it stands in the text in characters, and what it weighed."""

    text: str
    start: int
    end: int
    weight: float = Field(description="above 0: it spoke for the likeliest label")


class Explained(BaseModel):
    """Scores with the words that decided."""

    predictions: list[Score] = Field(description="the likeliest first")
    words: list[WeighedWord] = Field(description="in the text's order")
    error: float = Field(
        description="how far the weights are from summing to the likeliest label's logit over the "
        "others' mean, less the same for the text with all words masked"
    )


class Guess(BaseModel):
    """A token, and how likely it is in a mask's place."""

    token_str: str
    score: float


class Error(BaseModel):
    """Why a request was refused."""

    error: str
    error_type: str


B = TypeVar("B", bound=Body)


def parse(model: type[B], body: bytes) -> B:
    """Read a body.

    Raises:
        Refused: 400, it is no JSON; 422, it has another form.
    """
    if not body.strip():
        raise RequestError(400, "Validation", "the request has no body; send JSON")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MOST_MISTAKES:
            known = ", ".join(model.model_fields)
            raise invalid(f"{error.error_count():,} mistakes; known keys are {known}") from None
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise RequestError(400, "Validation", str(first["msg"]))
    kind = str(first["loc"][1]) if len(first["loc"]) > 1 else ""
    if first["loc"][:1] == ("inputs",) and kind.startswith(("str", "list")):
        raise invalid("inputs: give a text, or a list of texts")
    path = ".".join(_shown(part) for part in first["loc"]) or "the body"
    if first["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        raise invalid(f"unknown key {path}; known are {known}")
    raise invalid(f"{path}: {str(first['msg'])[0].lower()}{str(first['msg'])[1:]}")


def _shown(part: int | str) -> str:
    text = str(part)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
