"""Single-label classification: exactly one of L labels for each text.

Shapes: n or B texts, L labels.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, Field, FiniteFloat
from torch import Tensor

from raybert.data.sources.row_table import LabelParser, parse_label
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.tasks.categorical import (
    class_table,
    cross_entropy,
    kl_divergence,
    mean_logits,
    ranking,
    softmax,
)
from raybert.tasks.classification_metrics import classification_scores, fit_temperature
from raybert.tasks.entities import Word
from raybert.tasks.label_errors import likely_errors
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

_WRONG_EXAMPLES, _RIGHT_EXAMPLES = 8, 4  # for the report


class Score(AnswerElement):
    """A label with its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class SingleLabel(TextTask):
    """Cross-entropy, accuracy to select a model, probabilities calibrated by a temperature."""

    name: ClassVar = "single_label"
    title: ClassVar = "classification"
    answer_form: ClassVar = "labels"
    problem_type: ClassVar = "single_label_classification"
    fitted_keys: ClassVar = ("temperature",)
    fitted_types: ClassVar = {"temperature": Annotated[FiniteFloat, Field(gt=0)]}
    selection_metrics: ClassVar = {"accuracy": True, "loss": False, "f1_macro": True}
    search_space: ClassVar = {"finetune.label_smoothing": {"choice": [0.0, 0.05, 0.1]}}

    @classmethod
    def recognizes(cls, texts: Sequence[Any], labels: Sequence[Any]) -> str | None:
        return "one label for each text"

    @classmethod
    def describes(cls, architecture: str, problem_type: str | None, num_labels: int) -> bool:
        own = problem_type in (None, cls.problem_type)
        return architecture.endswith((cls.architecture, "RaybertClassifier")) and own

    @classmethod
    def parser(cls, source: SourceConfig) -> LabelParser:
        return functools.partial(parse_label, names=source.labels)

    @classmethod
    def find_labels(cls, labels: Sequence[str], source: SourceConfig) -> list[str]:
        if source.labels is not None:
            return source.labels
        found = sorted(labels, key=sort_key)
        if len(found) < 2:
            raise DataError(
                f"{', '.join(source.paths)}: every row has the label {found[0]!r}; a classifier "
                "needs two, so check label_column and split"
            )
        return found

    def targets(self, labels: Sequence[str]) -> npt.NDArray[np.int64]:
        index = {name: i for i, name in enumerate(self.labels)}
        unknown = next((label for label in labels if label not in index), None)
        if unknown is not None:
            raise DataError(
                f"label {unknown!r} is not one of the {len(index)} labels "
                f"({', '.join(self.labels[:20])}); add it to labels, or fix the row"
            )
        return np.array([index[label] for label in labels], np.int64)

    def no_targets(self, count: int) -> npt.NDArray[np.int64]:
        return np.full(count, NO_LABEL, np.int64)

    def suspicions(
        self, train: Sequence[str], validation: Sequence[str], source: SourceConfig
    ) -> list[str]:
        texts = len(train) + len(validation)
        return label_suspicions(self.labels, Counter(train), Counter(validation), texts, source)

    def make_loss(self, config: LossSettings, targets: Targets) -> Loss:
        return cross_entropy(config, np.asarray(targets), len(self.labels))

    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        return kl_divergence(expected, found)

    def validate(self, outputs: Outputs, targets: Targets) -> Metrics:
        scores = self._metrics(np.asarray(outputs), np.asarray(targets))
        return {name: scores[name] for name in self.selection_metrics}

    def ratio_parts(self, outputs: Outputs, targets: Targets) -> npt.NDArray[np.float64]:
        is_correct = np.asarray(outputs).argmax(axis=1) == targets
        return np.stack([is_correct, np.ones(len(is_correct))], axis=1)

    def fit(self, outputs: Outputs, targets: Targets) -> SingleLabel:
        return replace(
            self, fitted={"temperature": fit_temperature(np.asarray(outputs), np.asarray(targets))}
        )

    def evaluate(self, outputs: Outputs, targets: Targets) -> Metrics:
        return self._metrics(self._scaled(outputs), np.asarray(targets))

    def _metrics(self, logits: F32, targets: npt.NDArray[np.int64]) -> Metrics:
        return classification_scores(logits, targets, self.labels)

    def _scaled(self, outputs: Outputs) -> F32:
        """The logits [n, L] divided by the temperature."""
        temperature = np.float32(self.fitted.get("temperature", 1.0))
        return np.asarray(np.asarray(outputs) / temperature, np.float32)

    def scores(self, outputs: Outputs) -> F32:
        return softmax(self._scaled(outputs))

    def mean(self, outputs: Sequence[F32]) -> F32:
        return mean_logits(outputs)

    def choose(self, outputs: Tensor) -> int:
        return int(outputs.argmax())

    def margin(self, outputs: Tensor, chosen: Any) -> Tensor:
        """The label's logit minus the mean of the others'."""
        value = outputs[:, chosen]
        return value - (outputs.sum(dim=1) - value) / max(1, outputs.shape[1] - 1)

    def answers(
        self, outputs: Outputs, words: Sequence[Sequence[Word]] | None, options: AnswerOptions
    ) -> list[list[dict[str, Any]]]:
        scores = np.asarray(outputs) if options.raw_scores else self.scores(outputs)
        count = options.top_k if options.all_scores else 1
        return [
            [
                {"label": self.labels[i], "score": round(float(row[i]), 6)}
                for i in ranking(row)[:count]
                if options.threshold is None or row[i] >= options.threshold
            ]
            for row in scores
        ]

    def named_scores(self, outputs: F32) -> dict[Any, float]:
        return dict(zip(self.labels, self.scores(outputs[None])[0].tolist(), strict=True))

    def decision(self, outputs: F32) -> dict[Any, float]:
        scores = self.named_scores(outputs)
        best = max(scores, key=scores.__getitem__)
        return {best: scores[best]}

    def sentiments(self) -> dict[str, int]:
        known = {name[:3]: name for name in ("negative", "neutral", "positive")}
        known |= {name: name for name in known.values()}
        labels = enumerate(label.casefold() for label in self.labels)
        return {known[label]: i for i, label in labels if label in known}

    def tensors(self, outputs: Outputs, words: Sequence[Sequence[Word]] | None) -> list[Tensors]:
        """`label` [n], the most probable one, and `scores` [n, L], calibrated probabilities."""
        count = len(outputs)
        scores = self.scores(outputs) if count else np.empty((0, len(self.labels)), np.float32)
        best = [self.labels[i] for i in scores.argmax(axis=1)] if count else []
        rounded = [round(float(score), 6) for score in scores.ravel()]
        size = count or -1
        return [
            Tensors("label", "BYTES", [size], best),
            Tensors("scores", "FP32", [size, len(self.labels)], rounded),
        ]

    @classmethod
    def answer_schema(cls) -> type[BaseModel]:
        return Score

    def columns(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        rows = []
        for answer in answers:
            scores = {each["label"]: each["score"] for each in answer}
            rows.append(
                {
                    "label": answer[0]["label"] if answer else None,
                    "score": answer[0]["score"] if answer else None,
                    "scores": {name: scores[name] for name in self.labels if name in scores},
                }
            )
        return rows

    def column_types(self) -> list[pa.Field]:
        scores = pa.struct([pa.field(name, pa.float64()) for name in self.labels])
        types = {"label": pa.string(), "score": pa.float64(), "scores": scores}
        return [pa.field(name, type) for name, type in types.items()]

    def examples(self, outputs: Outputs, targets: Targets) -> list[tuple[int, dict[str, Any]]]:
        """The most confident wrong and right predictions."""
        probabilities, labels = self.scores(outputs), np.asarray(targets)
        predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        wrong = np.flatnonzero(predicted != labels)
        right = np.flatnonzero(predicted == labels)
        chosen = [
            *wrong[np.argsort(-confidence[wrong])][:_WRONG_EXAMPLES],
            *right[np.argsort(-confidence[right])][:_RIGHT_EXAMPLES],
        ]
        return [
            (
                int(row),
                {
                    "label": self.labels[labels[row]],
                    "predicted": self.labels[predicted[row]],
                    "probability": round(float(confidence[row]), 4),
                },
            )
            for row in chosen
        ]

    def label_errors(self, outputs: Outputs, targets: Targets) -> list[tuple[int, dict[str, Any]]]:
        return [
            (
                found.row,
                {
                    "label": self.labels[int(np.asarray(targets)[found.row])],
                    "suggested": self.labels[found.suggested],
                    "probability": round(found.probability, 4),
                },
            )
            for found in likely_errors(np.asarray(self.scores(outputs)), np.asarray(targets))
        ]

    def tables(self, metrics: Metrics) -> list[TableData]:
        return [class_table("Scores per class", "label", "rows", metrics)]


def sort_key(label: str) -> tuple[int, int, str]:
    """Sort integers first and by value, then names alphabetically."""
    # Of more digits Python converts none, and nobody counts that far.
    return (0, int(label), "") if re.fullmatch(r"-?[0-9]{1,300}", label) else (1, 0, label)
