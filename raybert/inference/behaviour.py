"""Behavioural tests of a classifier (CheckList, arXiv 2005.04118), and of texts that are cut.

Invariance: held-out texts get a change that should not matter, and the answer should stay.
Direction: a clear sentence is added, and the probability of the opposite must not rise by more
than 0.1. Minimum functionality: simple sentences whose label is known, where labels say negative
and positive. The sentences are English, so they are used where the texts are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.inference.classifier import Text, TextClassifier
from raybert.inference.text_changes import (
    are_english,
    first_part,
    in_lower_case,
    with_other_end,
    with_other_names,
    with_sentence,
    with_typos,
)
from raybert.tasks.comparison import Predictions, take
from raybert.tasks.protocol import Outputs

Passed = npt.NDArray[np.bool_]

_MIN_TEXTS = 5  # that a change has changed
_SHARES = (0.25, 0.5, 0.75)
_MAX_RISE = 0.1  # of a probability; CheckList's
_SHOWN = 300  # characters of a failed example

_INVARIANCES: dict[str, Callable[[str], str]] = {
    "typos": with_typos,
    "lower case": in_lower_case,
    "last punctuation mark": with_other_end,
}
_ENGLISH_INVARIANCES: dict[str, Callable[[str], str]] = {
    "other names": with_other_names,
}
_NEUTRAL_SENTENCE = "It was on a Tuesday."
#: A sentence that is added, and the sentiment that it must not make more probable.
_DIRECTIONS = {
    "negated praise added": ("I would not recommend it, it is not good.", "positive"),
    "praise added": ("I would recommend it, it is very good.", "negative"),
}
_THINGS = ("film", "book", "product", "service", "story", "place")
#: Sentences with a gap, and whether the sentiment of the answer is right.
_SENTENCES: dict[str, tuple[Sequence[str], Callable[[str | None], bool]]] = {
    "negated praise": (
        ("This is not a good {}.", "I did not like this {}.", "This {} is not great.",
         "I can't recommend this {}."),
        lambda found: found != "positive",
    ),
    "negated blame": (
        ("This is not a bad {}.", "This {} is not boring.", "I don't regret this {}.",
         "There is nothing wrong with this {}."),
        lambda found: found != "negative",
    ),
    "neutral sentences": (
        ("This is a {}.", "I heard of this {} on Monday.", "The {} has a name.",
         "I am writing about a {}."),
        lambda found: found == "neutral",
    ),
}  # fmt: skip


def measure_behaviour(
    classifier: TextClassifier, texts: Sequence[Text], found: Predictions, count: int, seed: int = 0
) -> dict[str, Any]:
    """Test a classifier on `count` of the texts that `found` are the outputs of, drawn at random.

    Returns plain JSON: `texts`, their number; `tests`, of each its name, kind, number of texts,
    share `passed` and one that failed; `truncated`, the metric for the first quarter, half and
    three quarters of the texts, and of whole ones; none for tasks on tokens.
    """
    rows = np.random.default_rng(seed).permutation(len(texts))[:count]
    texts, part = [texts[row] for row in rows], take(found, rows)
    is_english = are_english([" ".join(_sides(text)) for text in texts])
    tests = _invariances(classifier, texts, part.outputs, is_english=is_english)
    if not classifier.reads_pairs and is_english:
        sentiments = classifier.task.sentiments()
        if {"negative", "positive"} <= sentiments.keys():
            tests += _directions(classifier, texts, part.outputs, sentiments)
            tests += _sentences(classifier, sentiments)
    return {"texts": len(texts), "tests": tests, "truncated": _truncated(classifier, texts, part)}


def _invariances(
    classifier: TextClassifier, texts: Sequence[Text], outputs: Outputs, *, is_english: bool
) -> list[dict[str, Any]]:
    changes = dict(_INVARIANCES)
    if is_english:
        changes |= _ENGLISH_INVARIANCES
        if not classifier.reads_pairs:  # what is said of one text may change what it is to another
            add = functools.partial(with_sentence, sentence=_NEUTRAL_SENTENCE)
            changes["neutral sentence added"] = add
    tests = []
    for name, change in changes.items():
        changed = [_map(change, text) for text in texts]
        rows = [i for i, text in enumerate(texts) if text != changed[i]]
        if len(rows) < _MIN_TEXTS:
            continue
        before, after = [texts[i] for i in rows], [changed[i] for i in rows]
        words = classifier.words(before), classifier.words(after)
        passed = classifier.task.same_answers(
            [outputs[i] for i in rows], classifier.outputs(after), words
        )
        tests.append(_result(name, "invariance", after, passed))
    return tests


def _directions(
    classifier: TextClassifier,
    texts: Sequence[Text],
    outputs: Outputs,
    sentiments: Mapping[str, int],
) -> list[dict[str, Any]]:
    before, tests = np.asarray(classifier.task.scores(outputs)), []
    for name, (sentence, opposite) in _DIRECTIONS.items():
        changed = [with_sentence(str(text), sentence) for text in texts]
        after = np.asarray(classifier.task.scores(classifier.outputs(changed)))
        rise = (after - before)[:, sentiments[opposite]]
        tests.append(_result(name, "direction", changed, rise <= _MAX_RISE))
    return tests


def _sentences(classifier: TextClassifier, sentiments: Mapping[str, int]) -> list[dict[str, Any]]:
    names = {index: name for name, index in sentiments.items()}
    tests = []
    for name, (templates, is_right) in _SENTENCES.items():
        if name == "neutral sentences" and "neutral" not in sentiments:
            continue
        texts = [t.format(thing) for t, thing in itertools.product(templates, _THINGS)]
        best = np.asarray(classifier.task.scores(classifier.outputs(texts))).argmax(axis=1)
        passed = np.array([is_right(names.get(int(index))) for index in best])
        tests.append(_result(name, "minimum functionality", texts, passed))
    return tests


def _truncated(
    classifier: TextClassifier, texts: Sequence[Text], found: Predictions
) -> list[dict[str, float]]:
    if classifier.task.is_per_token:  # their targets are of the whole text
        return []
    task, metric = found.task, found.task.default_metric
    rows = []
    for share in (*_SHARES, 1.0):
        cut = [_map(functools.partial(first_part, share=share), text) for text in texts]
        outputs = found.outputs if share == 1 else classifier.outputs(cut)
        rows.append({"share": share, "score": float(task.validate(outputs, found.targets)[metric])})
    return rows


def _result(name: str, kind: str, texts: Sequence[Text], passed: Passed) -> dict[str, Any]:
    failed = next((text for text, ok in zip(texts, passed, strict=True) if not ok), None)
    shown = None if failed is None else " | ".join(_sides(failed))[:_SHOWN]
    return {
        "name": name,
        "kind": kind,
        "texts": len(passed),
        "passed": float(passed.mean()),
        "failed": shown,
    }


def _sides(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _map(change: Callable[[str], str], text: Text) -> Text:
    return change(text) if isinstance(text, str) else (change(text[0]), change(text[1]))
