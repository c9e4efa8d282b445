"""Entities in a text: BIO tags to character spans, and the scores of predicted entities.

Tags follow IOB2: `B-TYPE` begins an entity, `I-TYPE` continues one of the same type, `O` is
outside. Malformed sequences are read by seqeval's default rules, which are those of
`transformers`' pipeline, too: `I-TYPE` after another type or after `O` begins an entity.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tokenizers import Encoding

OUTSIDE = "O"


class Span(NamedTuple):
    """An entity: characters, words or tokens `start` to `end` (exclusive), and its type."""

    start: int
    end: int
    type: str


def split_tag(tag: str) -> tuple[str, str]:
    """Split a tag into prefix and type; a tag without a prefix continues an entity of its name."""
    prefix, dash, kind = tag.partition("-")
    if tag == OUTSIDE:
        return OUTSIDE, ""
    return (prefix, kind) if dash and prefix in ("B", "I") else ("I", tag)


def spans_of_tags(tags: Sequence[str]) -> list[Span]:
    """The entities of a tag sequence, in word indices."""
    spans: list[Span] = []
    begin, current = 0, ""
    for index, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        if current and (prefix != "I" or kind != current):
            spans.append(Span(begin, index, current))
            current = ""
        if kind and not current:
            begin, current = index, kind
    return spans


def tags_of_words(words: Sequence[tuple[int, int]], spans: Iterable[Span]) -> list[str]:
    """Tag words, each given by its characters (start, end), with the spans that contain them.

    A word belongs to a span if they overlap. Spans are sorted and do not overlap.
    """
    tags = [OUTSIDE] * len(words)
    remaining = iter(spans)
    span = next(remaining, None)
    has_begun = False
    for index, (start, end) in enumerate(words):
        while span is not None and span.end <= start:
            span, has_begun = next(remaining, None), False
        if span is not None and span.start < end and start < end:
            tags[index] = f"{'I' if has_begun else 'B'}-{span.type}"
            has_begun = True
    return tags


def entity_scores(
    expected: Sequence[Iterable[Span]], predicted: Sequence[Iterable[Span]]
) -> dict[str, Any]:
    """Score entities by exact match of span and type, as seqeval does.

    Args:
        expected: the entities of each text.
        predicted: the predicted ones, in the same order and the same units.

    Returns:
        precision, recall, f1: over all entities (micro average).
        f1_macro: the mean over the types that occur or are predicted.
        per_class: `{type: {precision, recall, f1, support}}`.

        NaN is a ratio of nothing: the precision of a type that is never predicted, the recall and
        the F1 of one that never occurs.
    """
    counts = {name: Counter[str]() for name in ("support", "predicted", "correct")}
    for truth, found in zip(expected, predicted, strict=True):
        wanted, given = set(truth), set(found)
        counts["support"].update(span.type for span in wanted)
        counts["predicted"].update(span.type for span in given)
        counts["correct"].update(span.type for span in wanted & given)
    types = sorted(counts["support"] | counts["predicted"])
    per_class = {
        kind: _ratios(*(counts[name][kind] for name in ("correct", "predicted", "support")))
        for kind in types
    }
    totals = (counts[name].total() for name in ("correct", "predicted", "support"))
    micro = _ratios(*totals)
    # A type that never occurs but is predicted counts as 0.
    f1 = [0.0 if math.isnan(scores["f1"]) else scores["f1"] for scores in per_class.values()]
    f1 = f1 if micro["support"] else []
    return {
        **{name: micro[name] for name in ("precision", "recall", "f1")},
        "f1_macro": statistics.fmean(f1) if f1 else math.nan,
        "per_class": per_class,
    }


def _ratios(correct: int, predicted: int, support: int) -> dict[str, float]:
    return {
        "precision": correct / predicted if predicted else math.nan,
        "recall": correct / support if support else math.nan,
        "f1": 2 * correct / (predicted + support) if support else math.nan,
        "support": support,
    }


@dataclass(frozen=True)
class Word:
    """A word of a text as its tokenizer splits it: its characters, and its first token."""

    start: int
    end: int
    token: int


def words_of(encoding: Encoding) -> list[Word]:
    """The words of an encoded text, in order; special tokens belong to none."""
    words: dict[int, Word] = {}
    rows = zip(encoding.word_ids, encoding.offsets, strict=True)
    for token, (word_id, (start, end)) in enumerate(rows):
        if word_id is None or start == end:
            continue
        word = words.get(word_id)
        words[word_id] = Word(start, end, token) if word is None else replace(word, end=end)
    return list(words.values())
