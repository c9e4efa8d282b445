"""The types and bounds of the values in `config.json` that are read, checked before any is used.

Sizes are bounded so that tensors of any shape that passes can be described; whether they are those
of the weights is checked against the weights' own shapes, before memory is allocated for them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raybert.errors import DamagedError
from raybert.storage.folder import Folder

CONFIG_JSON = "config.json"
_MAX_SHOWN = 60  # characters of a key in a message


class _Values(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def _check_unicode(text: Any) -> Any:
    if isinstance(text, str):  # JSON can hold half of a surrogate pair, which no output can
        text.encode("utf-8")
    return text


_Text = Annotated[str, BeforeValidator(_check_unicode)]
#: A word, so that messages with it are one line.
_Name = Annotated[str, Field(pattern=r"^[\w.-]*$", max_length=100)]
_Size = Annotated[int, Field(ge=1, le=1 << 24)]  # a dimension of a layer
_Index = Annotated[int, Field(ge=0, le=1 << 24)]
_Length = Annotated[int, Field(ge=8, le=1 << 20)]  # tokens of a text
_Share = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]


class PreprocessingValues(_Values):
    """How texts are prepared; what else was saved there is not checked."""

    seq_len: _Length = 8
    head_tokens: _Index = 0
    html_breaks: Literal["space", "keep"] = "space"


class HeadValues(_Values):
    """A head that only raybert loads."""

    kind: Literal["standard", "keras"] = "standard"
    pooling: Literal["cls", "mean", "max"] | None = None


class TaskValues(_Values):
    """What a task stores; `TextTask.check_fitted` checks `fitted`."""

    name: _Name | None = None
    fitted: dict[str, Any] = {}
    columns: dict[str, Any] = {}


class RaybertValues(_Values):
    """The section `raybert`."""

    format_version: Annotated[int, Field(ge=1)] = 1
    preprocessing: PreprocessingValues = PreprocessingValues()
    head: HeadValues = HeadValues()
    task: TaskValues | None = None
    temperature: _Positive | None = None
    calibrated_temperature: _Positive | None = None


class ModelValues(_Values):
    """What every model directory may have."""

    model_type: _Name | None = None
    architectures: list[_Name] | None = None
    problem_type: _Name | None = None
    id2label: dict[str, _Text | int] | None = None
    raybert: RaybertValues = RaybertValues()


class _Rope(_Values):
    rope_type: _Name = "default"
    rope_theta: _Positive | None = None


class RopeParameters(_Values):
    """Rotary positions by the kind of a layer's attention."""

    full_attention: _Rope = _Rope()
    sliding_attention: _Rope = _Rope()


class EncoderValues(_Values):
    """What describes an encoder of BERT or ModernBERT."""

    vocab_size: _Size | None = None
    hidden_size: _Size | None = None
    num_hidden_layers: _Size | None = None
    num_attention_heads: _Size | None = None
    intermediate_size: _Size | None = None
    max_position_embeddings: _Length | None = None
    pad_token_id: _Index | None = None
    initializer_range: _Positive = 0.02
    hidden_dropout_prob: _Share = 0.1
    mlp_dropout: _Share = 0.0
    classifier_dropout: _Share | None = None
    classifier_pooling: Literal["cls", "mean"] = "cls"
    layer_norm_eps: _Positive = 1e-12
    norm_eps: _Positive = 1e-5
    local_attention: Annotated[int, Field(ge=2, le=1 << 24)] = 128
    layer_types: list[str] | None = None
    global_attn_every_n_layers: _Size = 3
    global_rope_theta: _Positive | None = None
    local_rope_theta: _Positive | None = None
    rope_parameters: RopeParameters | None = None


V = TypeVar("V", bound=BaseModel)


def check_values(schema: type[V], values: Mapping[str, Any], folder: Folder) -> V:
    """Return the values that a schema has; DamagedError: one has another type, or is too large."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part)[:_MAX_SHOWN] for part in first["loc"])
        found = f"{key}={reprlib.repr(first['input'])}".encode("ascii", "backslashreplace").decode()
        message = str(first["msg"])
        raise DamagedError(
            f"{folder.join(CONFIG_JSON)} is damaged: {found}: {message[0].lower()}{message[1:]}"
        ) from None
