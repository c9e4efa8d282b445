"""The binary extension of the Open Inference Protocol: tensors after the JSON, not in it.

`Inference-Header-Content-Length` is the length of the JSON; the tensors follow in the order of
`inputs` or `outputs`, little-endian, an element of BYTES after its length in four bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope

from raybert.serve import request_errors
from raybert.serve.http.json_route import JSONRequest, parse_object
from raybert.tasks.protocol import Tensors

LENGTH_HEADER = "Inference-Header-Content-Length"
_SIZE = "binary_data_size"
_MAX_ELEMENTS = 65_536  # of a tensor: each is decoded by itself
_NUMPY = {"FP32": "<f4", "BOOL": "?"}


class BinaryRequest(JSONRequest):
    """A request whose tensors may follow its JSON."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        """Let FastAPI parse the JSON, whatever the type of the whole body is."""
        names = [name for name, _ in scope["headers"]]
        if LENGTH_HEADER.lower().encode() in names:
            kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*kept, (b"content-type", b"application/json")]
        super().__init__(scope, receive)

    async def json(self) -> Any:
        """Parse the JSON; `data` of the tensors that follow it is filled in."""
        given = self.headers.get(LENGTH_HEADER)
        if given is None:
            return await super().json()
        body = await self.body()
        length = int(given[:20]) if given.isascii() and given.isdecimal() else -1
        if not 0 <= length <= len(body):
            raise request_errors.bad_request(
                f"{LENGTH_HEADER} is not the length of the JSON in a body of {len(body):,} bytes"
            )
        value = parse_object(body[:length])
        inputs = value.get("inputs")
        rest = memoryview(body)[length:]
        for tensor in inputs if isinstance(inputs, list) else []:
            size = _binary_size(tensor)
            if size is not None:
                if size > len(rest):
                    raise _unfit("a tensor is longer than the body")
                tensor["data"], rest = read_texts(rest[:size]), rest[size:]
        if rest:
            raise _unfit(f"{len(rest):,} bytes belong to no tensor")
        return value


def _binary_size(tensor: Any) -> int | None:
    """The bytes of a tensor that follow the JSON; None: it is in the JSON."""
    parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
    size = parameters.get(_SIZE) if isinstance(parameters, dict) else None
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 0 or "data" in tensor:
        raise _unfit(f"{_SIZE} is the number of bytes of a tensor without data")
    if tensor.get("datatype") != "BYTES":
        raise _unfit("texts have the datatype BYTES")
    return size


def read_texts(data: memoryview) -> list[str]:
    """Decode a tensor of BYTES, which are UTF-8 here; RequestError, 422, if it is none."""
    texts: list[str] = []
    at = 0
    try:
        while at < len(data):
            [size] = struct.unpack_from("<I", data, at)
            end = at + 4 + size
            if end > len(data) or len(texts) == _MAX_ELEMENTS:
                raise ValueError
            texts.append(str(data[at + 4 : end], "utf-8"))
            at = end
    except (ValueError, struct.error):
        raise _unfit("a tensor does not hold UTF-8 texts, each after its length") from None
    return texts


def respond(
    answer: Mapping[str, Any], tensors: Sequence[Tensors], is_binary: Sequence[bool]
) -> Response:
    """Return a response with some of its tensors after the JSON."""
    outputs, parts = [], []
    for tensor, binary in zip(tensors, is_binary, strict=True):
        values = tensor._asdict()
        if binary:
            data = _to_bytes(tensor)
            del values["data"]
            values["parameters"] = {_SIZE: len(data)}
            parts.append(data)
        outputs.append(values)
    head = json.dumps({**answer, "outputs": outputs}, ensure_ascii=False).encode()
    return Response(
        b"".join([head, *parts]),
        headers={LENGTH_HEADER: str(len(head))},
        media_type="application/octet-stream",
    )


def _to_bytes(tensor: Tensors) -> bytes:
    if tensor.datatype == "BYTES":
        encoded = [str(text).encode() for text in tensor.data]
        return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    return np.asarray(tensor.data, _NUMPY[tensor.datatype]).tobytes()


def _unfit(problem: str) -> request_errors.RequestError:
    return request_errors.invalid(f"binary data: {problem}")
