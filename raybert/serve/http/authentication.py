"""Bearer keys. A replica has only their digests, and neither keys nor digests are logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from raybert.errors import UserError

VARIABLE = "RAYBERT_API_KEYS"
MIN_LENGTH = 16  # characters of a key; `openssl rand -hex 32` makes 64
_SCHEME = b"bearer "


def read_keys(path: str | None) -> list[str]:
    """Read keys from a file, or else from the environment; return the SHA-256 of each, hexadecimal.

    A file has one key per line; lines that begin with # are ignored. The variable's keys are
    separated by commas or line breaks. UserError: the file can't be read or has no key, or a key is
    too short or not printable ASCII.
    """
    if path is not None:
        where = f"serve.keys={path}" if _is_path(path) else "serve.keys"
        try:
            _check_mode(Path(path).expanduser(), where)
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"{where}: {problem}; name a file with one key per line") from None
        keys = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    else:
        where = VARIABLE
        keys = [key.strip() for key in os.environ.get(VARIABLE, "").replace(",", "\n").split("\n")]
    keys = [key for key in keys if key]
    if path is not None and not keys:
        raise UserError(f"{where}: there is no key in it; `openssl rand -hex 32` makes one")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_LENGTH or not all("!" <= character <= "~" for character in key):
            raise UserError(
                f"{where}: key {number} is not {MIN_LENGTH} or more printable ASCII characters; "
                "`openssl rand -hex 32` makes one"
            )
    return [digest(key.encode()) for key in keys]


def _is_path(value: str) -> bool:
    """Whether a value may be shown: not the keys themselves in the place of their file."""
    if not value.isprintable():
        return False
    return value.startswith(("/", "~", ".")) or "." in value or len(value) < MIN_LENGTH


def _check_mode(path: Path, where: str) -> None:
    """Raise UserError if everybody can add keys to a file; warn if they can read them."""
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH:
        raise UserError(f"{where}: other users can write to it, and add keys; run chmod 600 on it")
    if mode & stat.S_IROTH:
        logging.getLogger(__name__).warning(
            "%s: other users of this machine can read it; run chmod 600 on it", where
        )


def digest(key: bytes) -> str:
    """Return the SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key).hexdigest()


class Keys:
    """The accepted keys; without any, every request is accepted."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = list(digests)

    def allow(self, authorization: bytes | None) -> bool:
        """Return whether the value of an Authorization header has one of the keys.

        All digests, which have one length, are compared in constant time: the duration does not
        depend on the keys.
        """
        if not self._digests:
            return True
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        given = digest(authorization[len(_SCHEME) :].strip())
        found = [hmac.compare_digest(given, known) for known in self._digests]
        return any(found)
