"""Open a file as text: decompressed, and as UTF-8 whatever its encoding is.

What a file begins with decides, unless `encoding` is configured: a byte order mark, else UTF-8
where it is valid. Of other bytes `chardet` guesses the encoding, and a few bytes that no usual text
of Western Europe has are taken for damage, which the rows' readers name.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from raybert.data.sources.compression import DAMAGED, Rejoined, take_head
from raybert.data.sources.files import File
from raybert.errors import DataError, one_line

#: What one document of plain text, and one record of another format, may have at most.
MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES = 128 << 20, 32 << 20
TOO_LONG = f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"
RECORD_TOO_LONG = f"longer than {MAX_RECORD_BYTES >> 20} MiB"
_HEAD_BYTES = 1 << 20  # that an encoding is recognized by
_GUESSED_BYTES = 1 << 16  # of them, for chardet
_BUFFER_BYTES = 1 << 20
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# A character of several bytes in UTF-8.
_MULTIBYTE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
# What texts of Western Europe have beside ASCII.
_WESTERN = frozenset(
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüýßœšžÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜœŒŠŽ¿¡«»‹›‘’‚“”„–—…•€£§°´©®™ºª·\xa0"
)
_MIN_GUESSED = 3  # bytes beside ASCII; of fewer, a guess has nothing to go by


class Opened(NamedTuple):
    """A file that is read from its beginning."""

    stream: io.BufferedReader  # UTF-8; bytes that could not be decoded stand as they are
    head: str  # its first characters
    encoding: str


def open_text(file: File, encoding: str | None = None) -> Opened:
    """Open a file for one pass; a DataError if it can't be read or its encoding is unknown."""
    raw = file.open_stream()
    try:
        head = take_head(raw, _HEAD_BYTES)
    except DAMAGED as error:
        raise damaged(file.name, error) from None
    known = detect_encoding(head) if encoding is None else encoding
    for mark, name in _BOMS:
        if head.startswith(mark) and codecs.lookup(name).name == codecs.lookup(known).name:
            head = head[len(mark) :]
            break
    stream: Any = Rejoined(head, raw)
    is_utf8 = codecs.lookup(known).name == "utf-8"
    if not is_utf8:
        stream = _Transcoded(stream, known, file.name)
    decoder = codecs.getincrementaldecoder(known)("surrogateescape")
    try:
        text = decoder.decode(head)
    except UnicodeError as error:
        raise _wrong_encoding(file.name, known, error) from None
    return Opened(io.BufferedReader(stream, _BUFFER_BYTES), text, known)


def detect_encoding(head: bytes) -> str:
    """The encoding of a file that begins with `head`; UTF-8 where nothing else is sure."""
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if b"\0" in head:
        return _wide_encoding(head) or "utf-8"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    beside = len(re.findall(rb"[\x80-\xff]", _MULTIBYTE.sub(b"", head)))
    if len(_MULTIBYTE.findall(head)) >= beside:
        return "utf-8"  # with damaged bytes
    found = {chr(byte) if byte < 0x80 else _cp1252(byte) for byte in set(head)}
    others = {character for character in found if not character.isascii()}
    if others <= _WESTERN:
        return "cp1252"
    return (_guess(head) if beside >= _MIN_GUESSED else None) or "utf-8"


def _cp1252(byte: int) -> str:
    return bytes([byte]).decode("cp1252", "replace")


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 without a mark: most characters of European languages have one byte that is 0."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) or max(even, odd) * 3 < len(head):
        return None
    name = "utf-16-le" if odd > even else "utf-16-be"
    try:
        codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return None
    return name


def _guess(head: bytes) -> str | None:
    """The encoding that chardet finds, if it can decode the whole head."""
    import chardet

    name = chardet.detect(head[:_GUESSED_BYTES])["encoding"]
    try:
        codecs.getincrementaldecoder(str(name))().decode(head)
        return codecs.lookup(str(name)).name
    except (LookupError, UnicodeError):
        return None


class _Transcoded(io.RawIOBase):
    """A stream in another encoding as UTF-8."""

    def __init__(self, stream: Any, encoding: str, name: str) -> None:
        self._stream, self._name, self._encoding = stream, name, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
        self._left = memoryview(b"")

    def readable(self) -> bool:  # noqa: D102
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        while not self._left:
            read = self._stream.read(_BUFFER_BYTES)
            try:
                text = self._decoder.decode(read, final=not read)
            except UnicodeError as error:
                raise _wrong_encoding(self._name, self._encoding, error) from None
            self._left = memoryview(text.encode("utf-8", "surrogateescape"))
            if not read and not self._left:
                return 0
        piece = self._left[: len(buffer)]
        buffer[: len(piece)] = piece
        self._left = self._left[len(piece) :]
        return len(piece)

    def close(self) -> None:  # noqa: D102
        if not self.closed:
            self._stream.close()
        super().close()


def lines(stream: Any, name: str, most: int = MAX_DOCUMENT_BYTES) -> Iterator[bytes | None]:
    """Yield a stream's lines without their line feeds; None for one of more than `most` bytes.

    A DataError if the stream is damaged.
    """
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)
    try:
        while line := buffered.readline(most):
            if len(line) < most or line.endswith(b"\n"):
                yield line.removesuffix(b"\n")
                continue
            while line and not line.endswith(b"\n"):
                line = buffered.readline(_BUFFER_BYTES)
            yield None
    except DAMAGED as error:
        raise damaged(name, error) from None


def read_document(stream: Any, name: str) -> bytes | None:
    """Read a stream to its end; None if it has more than MAX_DOCUMENT_BYTES.

    A DataError if it is damaged.
    """
    try:
        content = take_head(stream, MAX_DOCUMENT_BYTES + 1)
    except DAMAGED as error:
        raise damaged(name, error) from None
    return content if len(content) <= MAX_DOCUMENT_BYTES else None


def damaged(name: str, error: Exception | str) -> DataError:
    """The error for a compressed file or archive that is cut short or damaged."""
    reason = error if isinstance(error, str) else one_line(error)
    return DataError(
        f"{name} is truncated or damaged ({reason}); download it again and compare its checksum"
    )


def _wrong_encoding(name: str, encoding: str, error: UnicodeError) -> DataError:
    return DataError(f"{name}: not {encoding} ({error.args[-1]}); set encoding to the file's own")
