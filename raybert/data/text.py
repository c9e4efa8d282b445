"""Functions of one text: HTML line breaks and keyed hashes."""

from __future__ import annotations

import hashlib
import re

# Only one way to match any run of spaces: with two, a text of spaces alone would take minutes.
LINE_BREAK = re.compile(r"<\s*br\s*(?:/\s*)?>", re.IGNORECASE)


def replace_line_breaks(text: str, html_breaks: str) -> str:
    """Replace HTML line breaks by spaces if `html_breaks` is "space"; "keep" changes nothing."""
    return LINE_BREAK.sub(" ", text) if html_breaks == "space" and "<" in text else text


def text_hash(text: str, key: int) -> int:
    """A keyed 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(text_digest(text, key)[:8], "little")


def text_digest(text: str, key: int) -> bytes:
    """A keyed digest of 16 bytes, equal for texts that differ only in white space."""
    secret = key.to_bytes(16, "little", signed=True)
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16, key=secret).digest()
