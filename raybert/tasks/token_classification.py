"""Token classification: entities in a text, as tags of its words.

Rows have words with BIO tags, or a text with character spans; both become spans. Words are what the
tokenizer splits a text into before it looks for pieces, so that training and inference see the same
ones; the first piece of a word carries its tag. Entities are decoded as `transformers`' pipeline
does it with aggregation_strategy="first".

Shapes: n or B texts, T tokens, L tags.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from raybert.data.sources.row_table import LabelParser
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.tasks.categorical import (
    class_table,
    cross_entropy,
    kl_divergence,
    mean_logits,
    softmax,
)
from raybert.tasks.entities import (
    OUTSIDE,
    Span,
    Word,
    entity_scores,
    spans_of_tags,
    split_tag,
    tags_of_words,
)
from raybert.tasks.protocol import (
    F32,
    NO_LABEL,
    AnswerElement,
    AnswerOptions,
    Loss,
    LossSettings,
    Metrics,
    Outputs,
    TableData,
    Targets,
    Tensors,
    TextTask,
)
from raybert.tasks.suspicions import label_suspicions


class Entity(AnswerElement):
    """An entity, with its characters in the text."""

    entity_group: str
    score: float = Field(description="mean probability of the tags of its words")
    start: int
    end: int


@dataclass(frozen=True)
class TokenClassification(TextTask):
    """Cross-entropy of each word's tag, F1 of entities to select a model."""

    name: ClassVar = "token_classification"
    title: ClassVar = "token classification"
    answer_form: ClassVar = "entities"
    architecture: ClassVar = "ForTokenClassification"
    pipeline_tag: ClassVar = "token-classification"
    is_per_token: ClassVar = True
    accepts_pairs: ClassVar = False
    selection_metrics: ClassVar = {"f1": True, "f1_macro": True, "accuracy": True, "loss": False}
    search_space: ClassVar = {"finetune.label_smoothing": {"choice": [0.0, 0.05, 0.1]}}
    #: No state is pooled, and a text is read from its start.
    unused_settings: ClassVar = frozenset({"finetune.head.pooling", "finetune.head_share"})

    @classmethod
    def recognizes(cls, texts: Sequence[Any], labels: Sequence[Any]) -> str | None:
        if texts and all(isinstance(text, list) for text in texts):
            return "texts are lists of words"
        spans = [span for label in labels if isinstance(label, list) for span in label]
        are_spans = spans and all(
            isinstance(span, dict) and {"start", "end"} <= span.keys() for span in spans
        )
        return "labels are character spans" if are_spans else None

    @classmethod
    def parser(cls, source: SourceConfig) -> LabelParser:
        return _parse

    @classmethod
    def find_labels(cls, labels: Sequence[str], source: SourceConfig) -> list[str]:
        types = {kind for label in labels for _, _, kind in json.loads(label)}
        if source.labels is not None:
            names = list(
                dict.fromkeys(split_tag(name)[1] for name in source.labels if name != OUTSIDE)
            )
            unknown = sorted(types - set(names))
            if unknown:
                raise DataError(
                    f"{', '.join(source.paths)}: entity type {unknown[0]!r} is not one of "
                    f"labels={source.labels}; add it, or fix the rows"
                )
        else:
            names = sorted(types)
        if not names:
            raise DataError(
                f"{', '.join(source.paths)}: no text has an entity; check label_column="
                f"{source.label_column}"
            )
        return [OUTSIDE, *(f"{prefix}-{name}" for name in names for prefix in "BI")]

    def targets(self, labels: Sequence[str]) -> npt.NDArray[Any]:
        raise TypeError("tags belong to words: use token_targets")

    def token_targets(
        self, label: str, words: Sequence[Word], num_tokens: int
    ) -> npt.NDArray[np.int64]:
        """The tag of each token [T], NO_LABEL where none begins a word."""
        spans = [Span(*span) for span in json.loads(label)]
        index = {name: i for i, name in enumerate(self.labels)}
        tags = tags_of_words([(word.start, word.end) for word in words], spans)
        targets = np.full(num_tokens, NO_LABEL, np.int64)
        for word, tag in zip(words, tags, strict=True):
            if tag not in index:
                raise DataError(
                    f"entity type {split_tag(tag)[1]!r} is not one of this model's "
                    f"({', '.join(self.types)})"
                )
            targets[word.token] = index[tag]
        return targets

    def suspicions(
        self, train: Sequence[str], validation: Sequence[str], source: SourceConfig
    ) -> list[str]:
        trained, validated = (
            Counter(kind for label in part for _, _, kind in json.loads(label))
            for part in (train, validation)
        )
        entities = trained.total() + validated.total()
        return label_suspicions(self.types, trained, validated, entities, source)

    def groups(self, labels: Sequence[str]) -> Sequence[str]:
        """The types of entities in each text."""
        return [" ".join(sorted({kind for _, _, kind in json.loads(label)})) for label in labels]

    @property
    def types(self) -> list[str]:
        """The types of entities."""
        return list(dict.fromkeys(split_tag(name)[1] for name in self.labels if name != OUTSIDE))

    def make_loss(self, config: LossSettings, targets: Targets) -> Loss:
        tags = np.concatenate([np.asarray(row) for row in targets])
        return cross_entropy(config, tags, len(self.labels))

    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        return kl_divergence(expected, found)

    def evaluate(self, outputs: Outputs, targets: Targets) -> Metrics:
        expected: list[list[Span]] = []
        predicted: list[list[Span]] = []
        correct = count = 0
        loss = 0.0
        for logits, truth in zip(outputs, targets, strict=True):
            is_word = np.asarray(truth) != NO_LABEL  # [T]
            wanted, scores = np.asarray(truth)[is_word], np.asarray(logits)[is_word]
            if not len(wanted):
                expected.append([])
                predicted.append([])
                continue
            log_p = torch.from_numpy(scores.astype(np.float64)).log_softmax(-1).numpy()
            found = scores.argmax(axis=1)
            loss -= float(log_p[np.arange(len(wanted)), wanted].sum())
            correct += int((found == wanted).sum())
            count += len(wanted)
            expected.append(spans_of_tags([self.labels[i] for i in wanted]))
            predicted.append(spans_of_tags([self.labels[i] for i in found]))
        return {
            "n": len(expected),
            "words": count,
            **entity_scores(expected, predicted),
            "accuracy": correct / count if count else math.nan,
            "loss": loss / count if count else math.nan,
            "label_names": self.types,
        }

    def ratio_parts(self, outputs: Outputs, targets: Targets) -> npt.NDArray[np.float64]:
        """F1 of entities: twice those that are found, over all predicted and expected ones."""
        parts = []
        for logits, truth in zip(outputs, targets, strict=True):
            is_word = np.asarray(truth) != NO_LABEL  # [T]
            found = np.asarray(logits)[is_word].argmax(axis=1)
            predicted = set(spans_of_tags([self.labels[i] for i in found]))
            expected = set(spans_of_tags([self.labels[i] for i in np.asarray(truth)[is_word]]))
            parts.append((2 * len(predicted & expected), len(predicted) + len(expected)))
        return np.array(parts, np.float64).reshape(-1, 2)

    def scores(self, outputs: Outputs) -> Outputs:
        return [softmax(np.asarray(each)) for each in outputs]

    def mean(self, outputs: Sequence[F32]) -> F32:
        return mean_logits(outputs)

    def choose(self, outputs: Tensor) -> tuple[int, int]:
        """The token and tag of the most certain entity, or of the likeliest one."""
        inside = outputs.softmax(-1)[:, 1:]  # [T, L - 1], without O
        token, tag = divmod(int(inside.argmax()), inside.shape[1])
        return token, tag + 1

    def answers(
        self, outputs: Outputs, words: Sequence[Sequence[Word]] | None, options: AnswerOptions
    ) -> list[list[dict[str, Any]]]:
        assert words is not None
        return [
            # The last token is special, and follows the words where a long text was cut.
            self._entities(np.asarray(x), [w for w in row if w.token < len(x) - 1], options)
            for x, row in zip(outputs, words, strict=True)
        ]

    def _entities(
        self, logits: npt.NDArray[np.float32], words: Sequence[Word], options: AnswerOptions
    ) -> list[dict[str, Any]]:
        firsts = logits[[word.token for word in words]]  # [words, L]
        if not len(firsts):
            return []
        best = firsts.argmax(axis=1)
        shown = firsts if options.raw_scores else softmax(firsts)
        confidence = shown[np.arange(len(best)), best]
        found: list[dict[str, Any]] = [
            {
                "entity_group": span.type,
                "score": round(float(confidence[span.start : span.end].mean()), 6),
                "start": words[span.start].start,
                "end": words[span.end - 1].end,
            }
            for span in spans_of_tags([self.labels[i] for i in best])
        ]
        if options.threshold is not None:
            found = [each for each in found if each["score"] >= options.threshold]
        if options.top_k is not None:
            kept = sorted(found, key=lambda each: -each["score"])[: options.top_k]
            found = [each for each in found if each in kept]
        return found

    def named_scores(self, outputs: F32) -> dict[Any, float]:
        """By token and tag."""
        scores = softmax(outputs)
        return {(t, tag): float(p) for t, row in enumerate(scores) for tag, p in enumerate(row)}

    def decision(self, outputs: F32) -> dict[Any, float]:
        scores = softmax(outputs)
        best = scores.argmax(axis=1).tolist()
        return {(t, tag): float(scores[t, tag]) for t, tag in enumerate(best) if tag}

    def same_answers(self, before: Outputs, after: Outputs, words: Any) -> npt.NDArray[np.bool_]:
        """Whether the same types of entities are found in the same order."""
        each = [
            [[entity["entity_group"] for entity in answer] for answer in answers]
            for answers in (
                self.answers(outputs, of, AnswerOptions())
                for outputs, of in zip((before, after), words, strict=True)
            )
        ]
        return np.array([x == y for x, y in zip(*each, strict=True)])

    def tensors(self, outputs: Outputs, words: Sequence[Sequence[Word]] | None) -> list[Tensors]:
        """`entities` [n]: JSON of each text's entities."""
        found = self.answers(outputs, words or [], AnswerOptions())
        data = [json.dumps(each, ensure_ascii=False) for each in found]
        return [Tensors("entities", "BYTES", [len(outputs) or -1], data)]

    @classmethod
    def answer_schema(cls) -> type[BaseModel]:
        return Entity

    def columns(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"entities": list(answer)} for answer in answers]

    def column_types(self) -> list[pa.Field]:
        entity = pa.struct(
            [
                pa.field("entity_group", pa.string()),
                pa.field("score", pa.float64()),
                pa.field("start", pa.int64()),
                pa.field("end", pa.int64()),
            ]
        )
        return [pa.field("entities", pa.list_(entity))]

    def tables(self, metrics: Metrics) -> list[TableData]:
        return [class_table("Entities per type", "type", "entities", metrics)]


def _parse(text: Any, label: Any) -> tuple[Any, str | None, str | None]:
    """A `LabelParser`: the text, a JSON list of [start, end, type], and the problem if any.

    A text is a string with spans, or a list of words with as many tags; words are joined by spaces.
    """
    if isinstance(text, list | tuple | np.ndarray):
        words = [_decode(word).strip() for word in text]
        return _parse_tags(words, label)
    if isinstance(text, str) and isinstance(label, list) and label and _are_tags(label):
        return _parse_tags(text.split(), label)
    spans, problem = _parse_spans(label)
    if problem is not None or not isinstance(text, str | bytes):
        return text, None, problem or "text is neither a string nor a list of words"
    decoded = _decode(text)
    stripped = decoded.strip()
    shift = len(decoded) - len(decoded.lstrip())
    for start, end, kind in spans:
        if start < shift or end - shift > len(stripped):
            return text, None, f"span is outside of the text ([{start}, {end}, {kind!r}])"
    moved = [(start - shift, end - shift, kind) for start, end, kind in spans]
    return stripped, json.dumps(moved, ensure_ascii=False), None


def _decode(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _are_tags(label: Sequence[Any]) -> bool:
    return all(isinstance(tag, str | bytes) for tag in label)


def _parse_tags(words: list[str], tags: Any) -> tuple[Any, str | None, str | None]:
    """As `_parse`, for words with BIO tags."""
    if tags is None:
        return words, None, "no label"
    if isinstance(tags, str):
        tags = tags.split()
    if not isinstance(tags, list | tuple | np.ndarray):
        return words, None, f"label is no list of tags ({type(tags).__name__})"
    if len(tags) != len(words):
        return words, None, f"tags do not fit the words ({len(tags)} tags, {len(words)} words)"
    if not all(words):
        return words, None, "a word is empty"
    names = [_decode(tag).strip() for tag in tags]
    bad = next((name for name in names if name != OUTSIDE and not split_tag(name)[1]), None)
    if bad is not None:
        return words, None, f"tag is not O, B-TYPE or I-TYPE ({bad!r})"
    starts = np.cumsum([0, *(len(word) + 1 for word in words)]).tolist()
    spans = [(starts[span.start], starts[span.end] - 1, span.type) for span in spans_of_tags(names)]
    return " ".join(words), json.dumps(spans, ensure_ascii=False), None


def _parse_spans(value: Any) -> tuple[list[tuple[int, int, str]], str | None]:
    """Return (sorted spans, None), or ([], problem); spans are objects or lists of three."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError:
            return [], f"label is no list of spans ({_decode(value)[:40]!r})"
    if value is None:
        return [], "no label"
    if not isinstance(value, list | tuple | np.ndarray):
        return [], f"label is no list of spans ({type(value).__name__})"
    spans: list[tuple[int, int, str]] = []
    for span in value:
        if isinstance(span, dict):
            found = [span[key] for key in ("label", "type", "entity_group", "tag") if key in span]
            span = (span.get("start"), span.get("end"), found[0] if found else None)
        if not isinstance(span, list | tuple) or len(span) != 3:
            return [], "span is not start, end, label"
        start, end, kind = span
        if not (isinstance(start, int) and isinstance(end, int)) or kind is None:
            return [], "span is not start, end, label"
        kind = _decode(kind).strip()
        if not 0 <= start < end or not kind:
            return [], f"span is empty or has no label ([{start}, {end}, {kind!r}])"
        spans.append((start, end, kind))
    spans.sort()
    for left, right in itertools.pairwise(spans):
        if right[0] < left[1]:
            return [], f"spans overlap ({list(left)} and {list(right)})"
    return spans, None
