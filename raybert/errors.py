"""The exceptions of raybert.

RaybertError
├── UserError          a mistake that the user can fix: one line, exit code 2
│   ├── ConfigError    an invalid key or value of the configuration
│   └── DataError      an unusable file, row, column or label
├── StorageError       the storage cannot be read or written: exit code 2
├── DamagedError       a truncated or altered checkpoint, corpus part or model: exit code 2
└── Superseded         a newer attempt at the same run owns its storage
"""

INTERRUPTED = 130  # the exit code after Ctrl-C or SIGTERM


class RaybertError(Exception):
    """Base of all errors that raybert raises."""


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
    """A newer attempt at the same run has taken over its storage."""


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return (str(reason).strip().splitlines() or [type(error).__name__])[0]
