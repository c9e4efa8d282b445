"""Split CSV text into records, and go on after a bad one with its next line.

`csv` itself reads on to the next quote: a stray one makes a field of a hundred rows, and a text of
the wrong words. So a record whose quoting is wrong, that has another number of fields than the
header, or whose lines are records themselves, is one bad line here.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from raybert.data.sources.opening import MAX_RECORD_BYTES, RECORD_TOO_LONG

_SEEN_VALUES, _SEEN_CHARS = 1000, 64  # of a column: what is kept to recognize records by
_TESTED_LINES = 64  # of a record of many lines
_MIN_LINES = 7  # of a field, of which only each other say that they are records
_RECORDS_IN_FIELD = 0.8  # share of its lines that are records, from which a field swallows them
_OPEN_QUOTE = "a quote is open (to the end of the line, or over other rows)"


class Dialect(NamedTuple):
    """How a table is written."""

    delimiter: str
    quote: str = '"'  # "": fields are not quoted
    escape: str = ""  # "": a quote in a quoted field is doubled
    skips_space: bool = False  # after a delimiter

    def options(self) -> dict[str, Any]:
        """The options of `csv.reader`."""
        return {
            "delimiter": self.delimiter,
            "quotechar": self.quote or None,
            "quoting": csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            "escapechar": self.escape or None,
            "skipinitialspace": self.skips_space,
            "strict": True,
        }


def records(
    readline: Callable[[int], str], dialect: Dialect, width: int | None = None
) -> Iterator[list[str] | str]:
    """Yield the fields of each record, or the problem of a bad line; empty lines are left out.

    `width` is the number of fields of a good record; None: that of the first one. `readline` is
    that of a text stream without translation of line ends.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))  # never lowered again
    lines = _Lines(readline)
    reader = csv.reader(lines, **dialect.options())
    seen = _SeenValues()
    while True:
        lines.begin_record()
        problem = None
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _problem(str(error))
        if problem is None and len(fields) < 2 and not "".join(lines.taken).strip():
            continue
        if problem is None:
            width = width or len(fields)
            if len(fields) != width:
                problem = f"wrong number of fields ({len(fields)}, the header has {width})"
            if len(lines.taken) > 1 and seen.are_records(lines.taken, dialect, width):
                problem = _OPEN_QUOTE
        if problem not in (None, RECORD_TOO_LONG) and len(lines.taken) > 1:
            problem = _OPEN_QUOTE
        if problem is None:
            seen.add(fields)
            yield fields
            continue
        lines.give_back()
        reader = csv.reader(lines, **dialect.options())
        yield problem


def _problem(error: str) -> str:
    if "end of data" in error:
        return _OPEN_QUOTE
    if "expected after" in error:
        return "text follows a closing quote (double the quotes that belong to the text)"
    return RECORD_TOO_LONG if "larger than" in error or RECORD_TOO_LONG in error else error


class _Lines:
    """The lines of a stream for `csv.reader`; those of a bad record, but its first, come again."""

    def __init__(self, readline: Callable[[int], str]) -> None:
        self._readline = readline
        self._again: deque[str] = deque()
        self.begin_record()

    def begin_record(self) -> None:
        """Forget the lines of the last record."""
        self.taken: list[str] = []
        self._chars = 0

    def give_back(self) -> None:
        """Read the record's lines but the first once more."""
        self._again.extendleft(reversed(self.taken[1:]))

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._readline(MAX_RECORD_BYTES)
        if not line:
            raise StopIteration
        self.taken.append(line)
        self._chars += len(line)
        if self._chars >= MAX_RECORD_BYTES:
            while line and not line.endswith(("\n", "\r")):  # the rest of a line that is too long
                line = self._readline(MAX_RECORD_BYTES)
            raise csv.Error(RECORD_TOO_LONG)
        return line


class _SeenValues:
    """The values that columns with few different ones have had, as that of labels."""

    def __init__(self) -> None:
        self._columns: list[set[str] | None] | None = None

    def add(self, fields: Sequence[str]) -> None:
        """Remember a good record's values."""
        if self._columns is None:
            self._columns = [set() for _ in fields]
        for at, values in enumerate(self._columns):
            if values is not None and len(fields[at]) <= _SEEN_CHARS:
                values.add(fields[at])
                if len(values) > _SEEN_VALUES:
                    self._columns[at] = None

    def are_records(self, taken: Sequence[str], dialect: Dialect, width: int) -> bool:
        """Whether the lines of one record look like records themselves: a stray quote took them.

        They do if they have as many fields, of which one has a value that its column had before;
        or, of seven lines and more, if one column repeats its values and another one does not.
        """
        if width < 2 or not dialect.quote:
            return False
        first, *inner, last = [*taken[: _TESTED_LINES - 1], taken[-1]]
        head, quote, tail = first.rpartition(dialect.quote)
        begin, closing, end = last.partition(dialect.quote)
        rows = [_fields(line, dialect) for line in (head + tail, *inner, begin + end)]
        whole = [row for row in rows if len(row) == width]
        if len(whole) < _RECORDS_IN_FIELD * len(rows):
            return False
        columns = self._columns or [None] * width
        known = [
            any(v is not None and row[at] in v for at, v in enumerate(columns)) for row in whole
        ]
        if sum(known) >= _RECORDS_IN_FIELD * len(rows):
            return True
        distinct = sorted(len({row[at] for row in whole}) for at in range(width))
        repeats, differs = distinct[0] * 2 <= len(whole), distinct[-1] >= len(whole) * 0.9
        return len(rows) >= _MIN_LINES and repeats and differs


def _fields(line: str, dialect: Dialect) -> list[str]:
    """The fields of a line by itself; none if it is no whole record."""
    try:
        return next(csv.reader([line], **dialect.options()), [])
    except csv.Error:
        return []
