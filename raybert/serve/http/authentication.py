"""Bearer keys: who may ask. A replica knows their digests only, and nothing logs either."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from raybert.errors import UserError

VARIABLE = "RAYBERT_API_KEYS"
SHORTEST = 16  # characters of a key; `openssl rand -hex 32` makes 64
_SCHEME = b"bearer "


def read_keys(path: str | None) -> list[str]:
    """Read the digests of the keys of a file, or else of the environment.

    A file has a key a line, and lines that begin with # are left out; the variable has keys between
    commas or line breaks.

    Returns:
        SHA-256 of each key, hexadecimal; none where neither is given.

    Raises:
        UserError: the file can't be read, it has no key, or a key is short or no printable ASCII.
    """
    if path is not None:
        where = f"serve.keys={path}"
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"{where}: {reason}; name a file with a key a line") from None
        keys = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    else:
        where = VARIABLE
        keys = [key.strip() for key in os.environ.get(VARIABLE, "").replace(",", "\n").split("\n")]
    keys = [key for key in keys if key]
    if path is not None and not keys:
        raise UserError(f"{where}: there is no key in it; `openssl rand -hex 32` makes one")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST or not all("!" <= character <= "~" for character in key):
            raise UserError(
                f"{where}: key {number} is not {SHORTEST} or more printable ASCII characters; "
                "`openssl rand -hex 32` makes one"
            )
    return [digest(key.encode()) for key in keys]


def digest(key: bytes) -> str:
    """SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key).hexdigest()


class Keys:
    """The keys that are let in; where there are none, everybody is."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = list(digests)

    def allow(self, authorization: bytes | None) -> bool:
        """Whether the value of an Authorization header has one of the keys.

        Digests of equal length are compared, each in constant time, and always all of them: how
        long it takes says nothing about any key.
        """
        if not self._digests:
            return True
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        given = digest(authorization[len(_SCHEME) :].strip())
        found = [hmac.compare_digest(given, known) for known in self._digests]
        return any(found)
