"""A test set from a source that has none: `hold_out` divides its rows between two readings.

A keyed hash of the group, else of the text, decides: the same rows are held out whatever the order
of the rows, the format of the file or the share of another row, and copies of a text stay together.
"""

from __future__ import annotations

from typing import Any

from raybert.data.keyed import text_hash
from raybert.data.preprocess import replace_line_breaks
from raybert.data.sources.files import Row
from raybert.data.sources.settings import SourceConfig

_KEY = 0x7E57  # not a seed of a stage: the parts that stages hold out themselves are independent


def is_read(row: Row, config: SourceConfig) -> bool:
    """Whether a source reads a row: evaluation what is held out, all others the rest.

    A row without a text belongs to the rest.
    """
    unit = _unit(row, config)
    is_held = unit is not None and text_hash(unit, _KEY) < config.hold_out * 2**64
    return is_held == config.is_for_evaluation


def divides(training: SourceConfig, evaluation: SourceConfig) -> bool:
    """Whether `evaluation` reads only rows that `training`, of the same files, leaves out."""
    keys = ("hold_out", "group_column", "text_column")
    is_alike = all(getattr(training, key) == getattr(evaluation, key) for key in keys)
    is_evaluation = evaluation.is_for_evaluation and not training.is_for_evaluation
    return training.hold_out > 0 and is_alike and is_evaluation


def _unit(row: Row, config: SourceConfig) -> str | None:
    """What is never divided: the row's group, or its text."""
    value: Any = row.text
    if config.group_column is not None and row.others:
        value = row.others[list(config.other_columns).index("group")]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list):  # the words of a text
        value = " ".join(map(str, value))
    if value is None:
        return None
    text = str(value).encode("utf-8", "replace").decode()  # without lone surrogates
    # Whatever a stage's html_breaks are, and without what the text is stripped of.
    return replace_line_breaks(text, "space").strip()
