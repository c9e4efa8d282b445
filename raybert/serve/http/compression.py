"""Compressed request bodies: gzip and deflate, decoded up to the limit of a body's bytes."""

from __future__ import annotations

import asyncio
import zlib

from raybert.serve import request_errors
from raybert.serve.request_errors import RequestError

_GZIP_OR_ZLIB = 47  # zlib's wbits: find out by the header
_RAW = -15  # some clients send deflate without a header
_IN_THREAD = 16_384  # bytes from which the event loop does not decompress itself
_MEMBERS = 64  # of a body: each costs microseconds, also where it is empty
_KNOWN = ("gzip", "x-gzip", "deflate")


async def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decode a body by its Content-Encoding.

    RequestError: 415, another encoding; 400, it is damaged; 413, it has more than `max_bytes`.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _KNOWN:
        message = "send the body as it is, or with Content-Encoding: gzip or deflate"
        raise RequestError(415, "Validation", message, {"Accept-Encoding": "gzip, deflate"})
    if len(body) < _IN_THREAD:
        return _inflate(body, max_bytes)
    return await asyncio.to_thread(_inflate, body, max_bytes)


def _inflate(body: bytes, max_bytes: int) -> bytes:
    try:
        return _inflate_as(body, max_bytes, _GZIP_OR_ZLIB)
    except zlib.error:
        pass
    try:
        return _inflate_as(body, max_bytes, _RAW)
    except zlib.error:
        message = "the body is not what its Content-Encoding says, or was cut short"
        raise request_errors.bad_request(message) from None


def _inflate_as(body: bytes, max_bytes: int, wbits: int) -> bytes:
    """Decode all members of a body; zlib.error where it is damaged or cut short."""
    found = bytearray()
    for _ in range(_MEMBERS):
        if not body:
            return bytes(found)
        decoder = zlib.decompressobj(wbits)
        found += decoder.decompress(body, max_bytes + 1 - len(found))
        if len(found) > max_bytes:
            raise request_errors.too_large(
                f"the decompressed body has more than {max_bytes:,} bytes; send less at once"
            )
        if not decoder.eof:
            raise zlib.error("cut short")
        body = decoder.unused_data
    raise zlib.error("too many members")
