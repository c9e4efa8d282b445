"""A classifier's confusion matrix, scores per class, and most confident mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raybert.report.elements import Cell, Table, format_value
from raybert.report.stage_files import number

MAX_LABELS = 20  # of a confusion matrix; with more labels, as many of the most frequent confusions
MAX_MISTAKES = 12
MAX_TEXT = 700  # characters of an example


class Mistake(NamedTuple):
    """A wrong prediction."""

    predicted: str
    probability: str
    label: str
    text: str


def confusion_table(scores: Mapping[str, Any]) -> Table:
    """The confusion matrix, shaded by the share of the true label; empty if there is none."""
    matrix, names = scores.get("confusion"), _label_names(scores)
    if not matrix or len(names) != len(matrix):
        return Table("Confusion matrix", ())
    if len(names) > MAX_LABELS:
        return _most_frequent_confusions(matrix, names)
    rows: list[list[str | Cell]] = []
    for name, counts in zip(names, matrix, strict=True):
        shares = [count / max(1, sum(counts)) for count in counts]
        cells = (
            Cell(format_value(count), f"{share:.1%}", share)
            for count, share in zip(counts, shares, strict=True)
        )
        rows.append([name, *cells])
    head = ("label \\ predicted", *names)
    return Table("Confusion matrix", rows, head, has_row_headers=True)


def _most_frequent_confusions(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Table:
    pairs = sorted(
        ((c, i, j) for i, row in enumerate(matrix) for j, c in enumerate(row) if i != j and c),
        reverse=True,
    )[:MAX_LABELS]
    rows = [(names[i], names[j], format_value(count)) for count, i, j in pairs]
    return Table("Most frequent confusions", rows, ("label", "predicted", "rows"))


def class_table(scores: Mapping[str, Any]) -> Table:
    """Precision, recall and F1 of each class."""
    ratios = ("precision", "recall", "f1")
    rows = [
        (name, *(f"{found[ratio]:.4f}" for ratio in ratios), format_value(found["support"]))
        for name, found in scores.get("per_class", {}).items()
    ]
    head = ("label", *ratios, "rows")
    return Table("Scores per class", rows, head, has_row_headers=True)


def confident_mistakes(scores: Mapping[str, Any]) -> list[Mistake]:
    """The wrong predictions with the highest probabilities."""
    names = _label_names(scores)

    def name(label: Any) -> str:
        is_index = isinstance(label, int) and 0 <= label < len(names)
        return names[label] if is_index else str(label)

    def probability(example: Mapping[str, Any]) -> float:
        return number(example.get("probability")) or 0.0

    found = [
        (probability(e), name(e.get("predicted")), name(e.get("label")), str(e.get("text", "")))
        for e in scores.get("examples") or []
    ]
    wrong = [example for example in found if example[1] != example[2]]
    wrong.sort(key=lambda example: example[0], reverse=True)
    return [
        Mistake(predicted, f"{share:.1%}", label, _shorten(text))
        for share, predicted, label, text in wrong[:MAX_MISTAKES]
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rsplit(" ", 1)[0] + " …"


def _label_names(scores: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in scores.get("label_names") or scores.get("per_class") or []]
