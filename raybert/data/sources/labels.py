"""One spelling of a label, whatever the file's format: of `true`, `True`, 1, 1.0 and "1.00".

CSV has only strings, JSON numbers and booleans, Parquet all of these in several widths; what means
the same value has the same spelling, so that models, metrics and files of different formats agree.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from raybert.data.sources.arrow_tables import NamedClass

# A whole number with a fraction of zeros. Other fractions are kept: 3.10 is a version, not 3.1.
_WHOLE = re.compile(r"([+-]?)0*(\d+)\.0*")
_BOOLEANS = {"true": "1", "false": "0"}
_ID_DIGITS = 9  # of a number that may be a label's position
_SHOWN_CHARS, _SHOWN_NAMES = 60, 20
#: White space, and marks that no program shows, as that of UTF-8 files that were joined.
_INVISIBLE = " \t\r\n\xa0\u3000\ufeff\u200b\u2060\u200e\u200f"
NO_LABEL_GIVEN = "no label"  # the problem of an empty value


def spell(value: Any) -> tuple[str | None, str | None]:
    """The spelling of a raw label and None, or None and the problem with it.

    Whole numbers have no fraction, booleans are lower-case, text is in Unicode's composed form
    (NFC) without white space at its ends.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None, "label is not UTF-8"
    if value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value)):
        return None, NO_LABEL_GIVEN
    if isinstance(value, bool):
        return str(value).lower(), None
    if isinstance(value, float | decimal.Decimal):
        return _number(value), None
    if isinstance(value, int):
        return _digits(value), None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat(), None
    if not isinstance(value, str):
        return None, f"label is no name or number ({type(value).__name__})"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return None, "label is not UTF-8"
        value = unicodedata.normalize("NFC", value)
    text = " ".join(value.strip(_INVISIBLE).split())
    if not text:
        return None, NO_LABEL_GIVEN
    whole = _WHOLE.fullmatch(text)
    if text == "-0":
        return "0", None
    if whole:
        return ("-" if whole[1] == "-" and whole[2] != "0" else "") + whole[2], None
    return text.lower() if text.lower() in _BOOLEANS else text, None


def _number(value: float | decimal.Decimal) -> str:
    if not math.isfinite(value):
        return str(value).lower()
    if value == value.__floor__():
        return _digits(int(value))
    if isinstance(value, decimal.Decimal):
        return str(value.normalize())
    return repr(float(value))


def _digits(value: int) -> str:
    """A number's decimal digits; of more than Python converts, through `decimal`."""
    return f"{decimal.Decimal(value):f}"


class _Names:
    """The names that are allowed, by their spelling."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.by_spelling = {spell(name)[0]: name for name in reversed(names)}
        self.by_spelling |= {name: name for name in names}
        # Stars from 1 to 5 have no 0.
        self.are_numbers = any(name.isascii() and name.isdecimal() for name in names)


_last: _Names | None = None  # a table of labels has one list of names


def name_of(value: Any, names: Sequence[str] | None) -> tuple[str | None, str | None]:
    """The label among `names` that a raw value is, or its spelling where all are allowed.

    A value that is no name is the position of one, where the names are no numbers themselves.
    """
    global _last
    label, problem = spell(value)
    if label is None or names is None:
        return label, problem
    known = _last
    if known is None or known.names is not names:
        known = _last = _Names(names)
    exact = known.by_spelling.get(value.strip()) if isinstance(value, str) else None
    found = exact or known.by_spelling.get(label)
    if found is not None:
        return found, None
    number = str(value.number) if isinstance(value, NamedClass) else _BOOLEANS.get(label, label)
    if not known.are_numbers and number.isascii() and number.isdecimal():
        if len(number) <= _ID_DIGITS and int(number) < len(names):
            return names[int(number)], None
    shown = label if len(label) <= _SHOWN_CHARS else label[:_SHOWN_CHARS] + "..."
    most = [*names[:_SHOWN_NAMES], *(["..."] if len(names) > _SHOWN_NAMES else [])]
    return None, f"label {shown!r} is not one of labels={most}"
