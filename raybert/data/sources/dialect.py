"""Find out how a table is written: its delimiter, quoting, and whether it has a header line.

The delimiter is the one that finds the configured columns in the first line; otherwise `clevercsv`
finds it (van den Burg, Nazabal and Sutton, arXiv 1811.11242). Another quoting than the usual one is
chosen where it leaves fewer bad records in the file's beginning.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from raybert.data.sources.cells import KEEP, Columns
from raybert.data.sources.csv_records import Dialect, records
from raybert.data.sources.files import File, ReadOptions

_DELIMITERS = (",", "\t", ";", "|")
_TAB_SUFFIXES = (".tsv", ".tab")
_SAMPLE_CHARS = 1 << 16
_SNIFFED_CHARS, _SNIFFED_LINES = 1 << 14, 200  # for clevercsv, which takes 0.1 s for them
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n")  # the first line of Excel's files, at times
# A number, or the end of a sentence.
_NO_NAME = re.compile(r"^[+-]?\d+(?:[.,]\d+)?$|[.!?\u3002]$|\n")
_UNKNOWN_TO_CLEVERCSV = re.compile("[\0\ud800-\udfff]")  # it raises for them
_LABEL = "label"  # the usual name of a column of labels, also where none are read
_NAME_CHARS = 64  # of a column, at most
_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}


class Table(NamedTuple):
    """How a table is written, and the names of its columns."""

    dialect: Dialect
    names: list[str]
    has_header: bool
    has_separator_line: bool
    #: Names were given to columns without a header: which of two is the text.
    is_guessed: bool = False

    def __str__(self) -> str:
        dialect = self.dialect
        found = [f"delimiter {_NAMES.get(dialect.delimiter, repr(dialect.delimiter))}"]
        if dialect.quote != '"':
            found.append(f"quote {dialect.quote or 'none'}")
        if dialect.escape:
            found.append(f"escape {dialect.escape}")
        if not self.has_header:
            found.append("no header")
        if self.is_guessed:
            found.append(", ".join(f"column {n} is {s}" for n, s in enumerate(self.names, 1)))
        return ", ".join(found)


def detect_table(head: str, file: File, options: ReadOptions, columns: Columns) -> Table:
    """Find out how a table is written that begins with `head`."""
    sample = head[:_SAMPLE_CHARS]
    if len(head) > len(sample):  # without the line that is cut
        sample = sample[: sample.rfind("\n") + 1] or sample
    separator = _SEPARATOR_LINE.match(sample)
    if separator:
        sample = sample[separator.end() :]
    delimiter = options.delimiter or (separator and separator[1])
    dialect = Dialect(delimiter or _find_delimiter(sample, file, columns))
    dialect = _find_quoting(sample, dialect, options)
    found = itertools.islice(_sampled(sample, dialect), _SNIFFED_LINES)
    rows = [row for row in found if not isinstance(row, str)]
    names = [name.strip() for name in rows[0]] if rows else []
    has_header = options.has_header
    if has_header is None:
        has_header = not columns.keys().keys().isdisjoint(names) or _is_header(names, rows[1:])
    table = Table(dialect, names, has_header, separator is not None)
    return table if has_header else _name_columns(table, rows, columns)


def _is_header(names: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first record is names: short and different, no numbers, no values of others."""
    named = [name for at, name in enumerate(names) if name or at]  # pandas: an index without one
    if len(named) > 1 and named == [str(at) for at in range(len(named))]:
        return True  # pandas: columns without names
    return len(set(named)) == len(named) and not any(
        not name
        or len(name) > _NAME_CHARS
        or _NO_NAME.search(name)
        or any(at < len(row) and row[at].strip() == name for row in rows)
        for at, name in enumerate(names)
        if name or at
    )


def _name_columns(table: Table, rows: Sequence[Sequence[str]], columns: Columns) -> Table:
    """Name the columns of a table without a header 1, 2, ...

    Of at most two columns the one with the longer cells is the text, the other one the label.
    """
    width = len(table.names)
    names = [str(number) for number in range(1, width + 1)]
    read = {column for column, key in columns.keys().items() if key != KEEP}
    if width > 2 or columns.others or not read.isdisjoint(names):
        return table._replace(names=names)
    lengths = [sum(len(row[at]) for row in rows if at < len(row)) for at in range(width)]
    if width:
        text = lengths.index(max(lengths))
        names[text] = columns.text
        if width == 2 and not isinstance(columns.label, tuple):
            names[1 - text] = columns.label or _LABEL
    return table._replace(names=names, is_guessed=True)


def _sampled(sample: str, dialect: Dialect) -> Iterator[list[str] | str]:
    return records(io.StringIO(sample, newline="").readline, dialect)


def _first(sample: str, dialect: Dialect) -> list[str]:
    """The fields of the first record; none where its quoting is wrong."""
    row = next(_sampled(sample, dialect), [])
    return [] if isinstance(row, str) else row


def _find_delimiter(sample: str, file: File, columns: Columns) -> str:
    usual = "\t" if file.suffix in _TAB_SUFFIXES else ","
    candidates = sorted(_DELIMITERS, key=lambda delimiter: delimiter != usual)
    wanted = columns.keys()
    found = {}
    for delimiter in candidates:
        names = [name.strip() for name in _first(sample, Dialect(delimiter))]
        found[delimiter] = (sum(column in names for column in wanted), len(names))
    best = max(candidates, key=lambda delimiter: found[delimiter])
    if found[best] == (1, 1):  # of a single column, whose texts may have some of the signs
        return min(candidates, key=lambda delimiter: _bad_records(sample, Dialect(delimiter)))
    if found[best][0]:
        return best
    import clevercsv

    lines = sample[:_SNIFFED_CHARS].splitlines(keepends=True)[:_SNIFFED_LINES]
    present = [delimiter for delimiter in candidates if delimiter in sample]
    try:
        known = _UNKNOWN_TO_CLEVERCSV.sub("?", "".join(lines))
        sniffed = clevercsv.Sniffer().sniff(known, delimiters=present) if present else None
    except clevercsv.Error:
        sniffed = None
    return str(sniffed.delimiter) if sniffed and sniffed.delimiter else usual


def _find_quoting(sample: str, dialect: Dialect, options: ReadOptions) -> Dialect:
    """The configured quoting, else the usual one unless another one leaves fewer bad records."""
    quotes = ['"'] if options.quote is None else [options.quote]
    escapes = ["", "\\"] if options.escape is None else [options.escape]
    if options.quote is None and '"' not in sample and "'" in sample:
        quotes.append("'")
    candidates = [
        dialect._replace(quote=quote, escape=escape, skips_space=skips_space)
        for quote in quotes
        for escape in escapes
        for skips_space in (False, True)
    ]
    best, bad = candidates[0], _bad_records(sample, candidates[0])
    for other in candidates[1:] if bad else []:
        count = _bad_records(sample, other)
        if count < bad:
            best, bad = other, count
    # Two lines at least: a single stray quote is a bad row of a quoted table.
    is_quoted = re.search(rf'(?:^|{re.escape(dialect.delimiter)})"[^"\n]*"', sample, re.MULTILINE)
    if options.quote is None and bad >= 2 and not is_quoted:
        plain = dialect._replace(quote="", escape=options.escape or "")
        if _bad_records(sample, plain) < bad:
            return plain
    return best


def _bad_records(sample: str, dialect: Dialect) -> int:
    return sum(isinstance(row, str) for row in _sampled(sample, dialect))
