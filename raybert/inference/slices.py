"""The score of groups of evaluated texts: by length, and by the values of columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.tasks.comparison import Predictions, take

_MIN_TEXTS = 10  # of a slice
_MOST_VALUES = 12  # of a column, the most frequent ones
_QUARTERS = (25, 50, 75)


def slice_scores(
    found: Predictions, texts: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Slices of at least 10 texts: `by`, `value`, `texts`, and `score`, the default metric.

    By length in words, in quarters of the texts; and by each of `columns`, a value for each text.
    """
    words = np.array([len(text.split()) for text in texts])
    ends = [0, *np.percentile(words, _QUARTERS).astype(int).tolist(), int(words.max())]
    slices: list[tuple[str, str, npt.NDArray[np.int64]]] = []
    for low, high in zip(ends, ends[1:], strict=False):
        rows = np.flatnonzero((words > low) & (words <= high))
        slices.append(("words", f"{low + 1} to {high}", rows))
    for name, values in columns.items():
        if all(value is None for value in values):  # there is no such column
            continue
        shown = np.array([str(value) for value in values])
        for value, _ in Counter(shown.tolist()).most_common(_MOST_VALUES):
            slices.append((name, value, np.flatnonzero(shown == value)))
    return [
        {"by": by, "value": value, "texts": len(rows), "score": _score(found, rows)}
        for by, value, rows in slices
        if len(rows) >= _MIN_TEXTS
    ]


def _score(found: Predictions, rows: npt.NDArray[np.int64]) -> float:
    part = take(found, rows)
    return float(part.task.validate(part.outputs, part.targets)[part.task.default_metric])
