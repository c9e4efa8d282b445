"""What a classifier confuses: the matrix, the scores per class, the mistakes it is surest of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raybert.report.markup import Html, fold, join, show, table, tag
from raybert.report.stage_files import number

MAX_LABELS = 20  # of a confusion matrix; beyond that the worst pairs say more
MAX_MISTAKES = 12
MAX_TEXT = 700  # characters of an example


def confusion(scores: Mapping[str, Any]) -> Html:
    """The confusion matrix, its colours the share of the true label; and the scores per class."""
    matrix, names = scores.get("confusion"), _label_names(scores)
    if not matrix or len(names) != len(matrix):
        return Html()
    if len(names) > MAX_LABELS:
        pairs = sorted(
            ((c, i, j) for i, row in enumerate(matrix) for j, c in enumerate(row) if i != j and c),
            reverse=True,
        )[:MAX_LABELS]
        head = tag("tr", *(tag("th", t) for t in ("label", "predicted", "rows")))
        body = [
            tag("tr", tag("td", names[i]), tag("td", names[j]), tag("td", show(count)))
            for count, i, j in pairs
        ]
        title = "Most frequent confusions"
    else:
        head = tag("tr", tag("th", "label \\ predicted"), *(tag("th", name) for name in names))
        body = []
        for name, row in zip(names, matrix, strict=True):
            shares = [count / max(1, sum(row)) for count in row]
            cells = (
                tag("td", show(count), " ", tag("small", f"{share:.1%}"), class_="heat",
                    style=f"--heat:{share:.3f}")
                for count, share in zip(row, shares, strict=True)
            )  # fmt: skip
            body.append(tag("tr", tag("th", name, scope="row"), *cells))
        title = "Confusion matrix"
    ratios = ("precision", "recall", "f1")
    classes = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", f"{s[r]:.4f}") for r in ratios),
            tag("td", show(s["support"])))
        for name, s in scores.get("per_class", {}).items()
    ]  # fmt: skip
    class_head = tag("tr", tag("th", "label"), *(tag("th", t) for t in (*ratios, "rows")))
    return join(
        [
            tag("h3", title),
            table(head, body),
            fold("Scores per class", table(class_head, classes) if classes else Html()),
        ]
    )


def mistakes(scores: Mapping[str, Any]) -> Html:
    """The wrong predictions that the classifier was surest of."""
    names = _label_names(scores)

    def name(label: Any) -> str:
        known = isinstance(label, int) and 0 <= label < len(names)
        return names[label] if known else str(label)

    wrong = [
        e for e in scores.get("examples") or [] if name(e.get("label")) != name(e.get("predicted"))
    ]
    wrong.sort(key=lambda e: number(e.get("probability")) or 0.0, reverse=True)
    if not wrong:
        return Html()
    cards = [
        tag(
            "li",
            tag(
                "p",
                tag("b", name(e.get("predicted"))),
                f" with {number(e.get('probability')) or 0.0:.1%}, in truth ",
                tag("b", name(e.get("label"))),
            ),
            tag("blockquote", _shorten(str(e.get("text", "")))),
        )
        for e in wrong[:MAX_MISTAKES]
    ]
    return join([tag("h3", "Most confident mistakes"), tag("ol", *cards, class_="cards")])


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rsplit(" ", 1)[0] + " …"


def _label_names(scores: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in scores.get("label_names") or scores.get("per_class") or []]
