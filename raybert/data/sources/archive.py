"""Read the members of a tar stream, compressed or not, without unpacking it.

`tarfile` is not used, for two measured reasons. In stream mode it takes 14 s of CPU for the 100,000
reviews of `aclImdb_v1.tar.gz` (decompression included), and this module 1.3 s: `tarfile` builds an
object with thirty attributes for every member. And it reports the end of a truncated archive
without an error if the cut is at or in a member's header (of an archive with four files of 1,000
bytes, at 256 of 832 places). So the headers (POSIX.1-1988 ustar, GNU names, pax) are read directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from raybert.errors import DataError

_BLOCK = 512
_CHUNK = 1 << 20
_REGULAR = (b"0", b"\0", b"7")


def members(stream: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every regular file of a decompressed tar, in the archive's order.

    A DataError if it is cut short or no tar archive.
    """
    window = _Window(stream, name)
    long_name: str | None = None
    long_size: int | None = None
    first = True
    while True:
        header = window.take(_BLOCK)
        if header.count(0) == _BLOCK:  # the end-of-archive mark; a cut archive has none
            return
        if first or header[257:262] != b"ustar":
            _verify(header, name, first)
        first = False
        size = _number(header[124:136], name)
        kind = header[156:157]
        if kind in (b"L", b"x", b"X"):
            extra = window.take(size, padded=True)
            if kind == b"L":
                long_name = _text(extra)
            else:
                fields = _pax(extra)
                long_name = fields.get("path", long_name)
                long_size = int(fields["size"]) if "size" in fields else None
            continue
        if long_size is not None:
            size = long_size
        content = window.take(size, padded=True)
        if kind in _REGULAR:
            yield long_name or _name(header), content
        if kind != b"g":
            long_name = long_size = None


class _Window:
    """Returns exact numbers of bytes of a stream that is read in large chunks."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._data, self._at = b"", 0

    def take(self, size: int, *, padded: bool = False) -> bytes:
        """Return the next `size` bytes; `padded` also skips the padding of the last block."""
        span = -(-size // _BLOCK) * _BLOCK if padded else size
        if self._at + span > len(self._data):
            self._fill(span)
        taken = self._data[self._at : self._at + size]
        self._at += span
        return taken

    def _fill(self, need: int) -> None:
        pieces = [self._data[self._at :]]
        have = len(pieces[0])
        while have < need:
            try:
                piece = self._stream.read(_CHUNK)
            except (OSError, EOFError) as error:
                raise truncated(self._name, str(error)) from None
            if not piece:
                raise truncated(self._name, "it ends before its end-of-archive mark")
            pieces.append(piece)
            have += len(piece)
        self._data, self._at = b"".join(pieces), 0


def read_all(stream: BinaryIO, name: str) -> bytes:
    """Read a stream to its end; a DataError if it is cut short or damaged."""
    try:
        return stream.read()
    except (OSError, EOFError) as error:
        raise truncated(name, str(error)) from None


def truncated(name: str, reason: str) -> DataError:
    """The error for a compressed file or archive that is cut short or damaged."""
    return DataError(
        f"{name} is truncated or damaged ({reason}); download it again and compare its checksum"
    )


def _verify(header: bytes, name: str, first: bool) -> None:
    stated = header[148:156]
    unsigned = sum(header) - sum(stated) + 8 * 0x20
    try:
        matches = int(stated.split(b"\0")[0].strip() or b"-1", 8) == unsigned
    except ValueError:
        matches = False
    if not matches:
        if first:
            raise DataError(f"{name} is not a tar archive; set format to what the file holds")
        raise truncated(name, "a member's header fails its checksum")


def _number(field: bytes, name: str) -> int:
    if field[0] & 0x80:  # GNU's base-256, for sizes of 8 GiB and more
        return int.from_bytes(field, "big") & ((1 << 88) - 1)
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise truncated(name, "a member's header holds no size") from None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(extra: bytes) -> dict[str, str]:
    """Parse pax records, each `length key=value` and a line feed."""
    fields = {}
    while extra.strip(b"\0"):
        length = int(extra[: extra.index(b" ")])
        key, _, value = extra[extra.index(b" ") + 1 : length - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        extra = extra[length:]
    return fields
