"""The exceptions that users see, as a tree.

RaybertError
├── UserError          a mistake that the user can mend: one line, exit code 2
│   ├── ConfigError    a key of the configuration
│   └── DataError      a file, row, column or label
├── StorageError       the storage could not be read or written: exit code 2, too
├── DamagedError       a checkpoint, part or model that is cut short or altered: exit code 2, too
└── Superseded         a younger attempt at the same run owns its storage
"""

INTERRUPTED = 130  # the exit code after Ctrl-C or SIGTERM


class RaybertError(Exception):
    """Anything that raybert raises on purpose."""


class UserError(RaybertError):
    """A mistake that the user can mend; the message says what is wrong and what to change."""


class ConfigError(UserError):
    """A configuration key whose value can't be used; the message names key, value and remedy."""


class DataError(UserError):
    """A file, row, column or label that can't be used; the message names where it stands."""


class StorageError(RaybertError):
    """The storage could not be read or written."""


class DamagedError(RaybertError):
    """A file of ours that is cut short or altered; the message names it."""


class Superseded(RaybertError):
    """A younger attempt at the same run has taken over its storage."""


def one_line(error: Exception) -> str:
    """What an error of the system's or Arrow's says, in a line; its type where that is nothing."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return (str(reason).strip().splitlines() or [type(error).__name__])[0]
