"""The exceptions of raybert; all but Superseded and RaybertError end a command with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_REASON = 1000  # characters of a library's message
INTERRUPTED = 130  # the exit code after Ctrl-C or SIGTERM


class RaybertError(Exception):
    """Base of the errors that end a command with one line."""


class UserError(RaybertError):
    """A mistake that the user can fix; the message names the cause and the remedy."""


class ConfigError(UserError):
    """An invalid configuration key or value; the message names key, value and remedy."""


class DataError(UserError):
    """An unusable file, row, column or label; the message names its position."""


class StorageError(RaybertError):
    """The storage cannot be read or written."""


class DamagedError(RaybertError):
    """A truncated or altered file that raybert wrote; the message names it."""


class Superseded(RaybertError):
    """A later attempt at the same run has taken over its storage."""


#: What code that reads values of JSON raises where they are not what was written.
UNEXPECTED = (
    ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError,
)  # fmt: skip


@contextmanager
def damaged_file(path: str) -> Iterator[None]:
    """Raise what unexpected content of a file causes as a DamagedError that names the file."""
    try:
        yield
    except UNEXPECTED as error:
        what = f"{type(error).__name__}: {one_line(error)}"[:100]
        raise DamagedError(
            f"{path} is damaged: its content is not what was written ({what})"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty.

    Of pydantic's errors the first one, with its key. Characters that are not printable are escaped,
    since messages of libraries quote files.
    """
    pydantic = sys.modules.get("pydantic")  # what starts light does without
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        parts = (".".join(map(str, first["loc"])), first["msg"].lower())
        return printable(": ".join(filter(None, parts)))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return printable((str(reason).strip().splitlines() or [type(error).__name__])[0])


def printable(text: str, most: int | None = _LONGEST_REASON) -> str:
    """One line of what a file says, for a message: cut, and all but printable signs escaped."""
    text = text[:most]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
