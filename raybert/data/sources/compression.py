"""Open compressed files: by what they begin with, whatever their names say.

Arrow decompresses gzip, bzip2, zstd and LZ4 frames, Python's `lzma` xz.
"""

from __future__ import annotations

import io
import lzma
import re
import zipfile
import zlib
from typing import Any

import pyarrow as pa

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
_BUFFER_BYTES = 1 << 20  # read at once
#: What the libraries raise for compressed data that is cut short or damaged.
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, pa.ArrowException)


def compression_of(head: bytes) -> str | None:
    """The compression of a file that begins with `head`; None: it is not compressed."""
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), None)


def decompressed(stream: Any) -> Any:
    """A stream's content, decompressed if it is compressed; raises `DAMAGED` when it is read."""
    head = take_head(stream, 16)
    name = compression_of(head)
    whole: Any = Rejoined(head, stream)
    if name is None:
        return whole
    if name == "xz":
        return lzma.LZMAFile(whole)
    return pa.CompressedInputStream(pa.PythonFile(whole, "r"), name)


def take_head(stream: Any, size: int) -> bytes:
    """Read the first `size` bytes, fewer only at the end."""
    pieces = []
    while size > 0 and (piece := stream.read(min(size, _BUFFER_BYTES))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


class Rejoined(io.RawIOBase):
    """A stream from whose beginning `head` was read, once more from its beginning."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:  # noqa: D102
        return True

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, or all."""
        if size < 0:
            return self._take(len(self._head)) + bytes(self._rest.read())
        return self._take(size) or bytes(self._rest.read(size))

    def _take(self, size: int) -> bytes:
        piece, self._head = bytes(self._head[:size]), self._head[size:]
        return piece

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:  # noqa: D102
        if not self.closed:
            self._rest.close()
        super().close()
