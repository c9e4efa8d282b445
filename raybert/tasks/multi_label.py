"""Multi-label classification: any number of labels for each text, none among them.

Each output is a decision of its own: a sigmoid, and a threshold that maximises the label's F1 on
the validation texts.

Shapes: n or B texts, L labels.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor

from raybert.data.sources.labels import NO_LABEL_GIVEN, name_of, spell
from raybert.data.sources.row_table import LabelParser
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.records import format_mean
from raybert.tasks.categorical import ranking
from raybert.tasks.entities import Word
from raybert.tasks.protocol import (
    F32,
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
    parse_with,
)
from raybert.tasks.suspicions import label_suspicions

_EXAMPLES = 8  # for the report
_DEFAULT_THRESHOLD = 0.5
_MIN_POSITIVES = 3  # on which a threshold is fitted; with fewer it would be noise
_MAX_WEIGHT = 100.0  # of the positive texts of a rare label
_TRUE, _FALSE = {"1", "true", "yes"}, {"0", "false", "no", ""}


class LabelDecision(AnswerElement):
    """A label with its probability."""

    label: str
    score: float
    selected: bool = Field(description="whether the score reaches the label's threshold")


@dataclass(frozen=True)
class MultiLabel(TextTask):
    """Binary cross-entropy for each label, micro-averaged F1 to select a model."""

    name: ClassVar = "multi_label"
    title: ClassVar = "multi-label classification"
    answer_form: ClassVar = "decisions"
    output_kind: ClassVar = "decision"
    problem_type: ClassVar = "multi_label_classification"
    fitted_keys: ClassVar = ("thresholds",)
    fitted_types: ClassVar = {"thresholds": dict[str, Annotated[float, Field(ge=0, le=1)]]}
    selection_metrics: ClassVar = {
        "f1_micro": True,
        "f1_macro": True,
        "average_precision": True,
        "accuracy": True,
        "loss": False,
    }
    search_space: ClassVar = {"finetune.label_smoothing": {"choice": [0.0, 0.05]}}

    @classmethod
    def recognizes(cls, texts: Sequence[Any], labels: Sequence[Any]) -> str | None:
        if any(isinstance(label, dict) for label in labels):
            cells = [cell for label in labels for cell in label.values()]
            is_binary = all(_cell(cell) in _TRUE | _FALSE for cell in cells)
            return "several label columns of 0 and 1" if is_binary else None
        given = [label for label in labels if label is not None]
        are_lists = given and all(isinstance(label, list) for label in given)
        names = [name for label in given for name in label] if are_lists else []
        are_names = names and all(isinstance(name, str | bytes | int) for name in names)
        return "labels are lists" if are_names else None

    @classmethod
    def describes(cls, architecture: str, problem_type: str | None, num_labels: int) -> bool:
        # A single output without a problem type: transformers' pipeline answers with a sigmoid.
        is_single_output = problem_type is None and num_labels == 1
        return architecture.endswith(cls.architecture) and (
            problem_type == cls.problem_type or is_single_output
        )

    @classmethod
    def parser(cls, source: SourceConfig) -> LabelParser:
        parse = functools.partial(_parse, names=source.labels, separator=source.label_separator)
        return functools.partial(parse_with, parse)

    @classmethod
    def find_labels(cls, labels: Sequence[str], source: SourceConfig) -> list[str]:
        if source.labels is not None:
            return source.labels
        if isinstance(source.label_column, list):
            return source.label_column
        found = sorted({name for label in labels for name in json.loads(label)})
        if not found:
            raise DataError(
                f"{', '.join(source.paths)}: no text has a label; check label_column="
                f"{source.label_column}"
            )
        return found

    def targets(self, labels: Sequence[str]) -> npt.NDArray[np.float32]:
        index = {name: i for i, name in enumerate(self.labels)}
        targets = np.zeros((len(labels), len(index)), np.float32)  # [n, L]
        for row, label in enumerate(labels):
            for name in json.loads(label):
                if name not in index:
                    raise DataError(
                        f"label {name!r} is not one of the {len(index)} labels "
                        f"({', '.join(self.labels[:20])}); add it to labels, or fix the row"
                    )
                targets[row, index[name]] = 1
        return targets

    def suspicions(
        self, train: Sequence[str], validation: Sequence[str], source: SourceConfig
    ) -> list[str]:
        trained, validated = (
            Counter(name for label in part for name in json.loads(label))
            for part in (train, validation)
        )
        return label_suspicions(
            self.labels, trained, validated, len(train) + len(validation), source
        )

    def make_loss(self, config: LossSettings, targets: Targets) -> Loss:
        weights = _positive_weights(config, np.asarray(targets))
        gamma, smoothing = config.focal_gamma, config.label_smoothing

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            is_known = ~targets.isnan()
            truth = torch.where(is_known, targets, 0.0)
            smooth = truth * (1 - smoothing) + smoothing / 2
            weight = None if weights is None else weights.to(logits.device)
            each = F.binary_cross_entropy_with_logits(
                logits, smooth, pos_weight=weight, reduction="none"
            )  # [B, L]
            if gamma:  # arXiv 1708.02002
                probability = torch.where(truth > 0.5, logits, -logits).sigmoid()
                each = (1 - probability) ** gamma * each
            # The mean over labels, so that learning rates do not depend on their number.
            return (each * is_known).sum() / logits.shape[-1]

        return loss

    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        """The mean over labels of the binary Kullback-Leibler divergence, in nats."""
        p = expected.sigmoid()
        yes = p * (F.logsigmoid(expected) - F.logsigmoid(found))
        no = (1 - p) * (F.logsigmoid(-expected) - F.logsigmoid(-found))
        return (yes + no).mean(-1)

    def fit(self, outputs: Outputs, targets: Targets) -> MultiLabel:
        probabilities, truth = sigmoid(np.asarray(outputs)), np.asarray(targets)
        thresholds = {
            name: best_threshold(probabilities[:, i], truth[:, i] > 0.5)
            for i, name in enumerate(self.labels)
        }
        return replace(self, fitted={"thresholds": thresholds})

    @property
    def thresholds(self) -> F32:
        """The least probability of each label that is selected, [L]."""
        fitted: Mapping[str, float] = self.fitted.get("thresholds", {})
        found = [fitted.get(name, _DEFAULT_THRESHOLD) for name in self.labels]
        return np.array(found, np.float32)

    def evaluate(self, outputs: Outputs, targets: Targets) -> Metrics:
        from sklearn.metrics import average_precision_score, precision_recall_fscore_support

        logits, truth = np.asarray(outputs), np.asarray(targets) > 0.5
        probabilities = sigmoid(logits)
        predicted = probabilities >= self.thresholds
        precision, recall, f1, support = precision_recall_fscore_support(
            truth, predicted, zero_division=np.nan
        )
        micro = precision_recall_fscore_support(
            truth, predicted, average="micro", zero_division=np.nan
        )
        occurs: npt.NDArray[np.bool_] = np.asarray(truth.any(axis=0))
        average_precision = [
            float(average_precision_score(truth[:, i], probabilities[:, i])) if occurs[i] else None
            for i in range(len(self.labels))
        ]
        known = [value for value in average_precision if value is not None]
        x = torch.from_numpy(logits.astype(np.float64))
        loss = F.binary_cross_entropy_with_logits(x, torch.from_numpy(truth.astype(np.float64)))
        return {
            "n": len(truth),
            "f1_micro": float(micro[2]) if occurs.any() else math.nan,
            "precision_micro": float(micro[0]),
            "recall_micro": float(micro[1]),
            "f1_macro": float(np.mean(np.nan_to_num(f1), where=occurs | predicted.any(axis=0)))
            if occurs.any()
            else math.nan,
            "average_precision": statistics.fmean(known) if known else math.nan,
            "accuracy": float((truth == predicted).all(axis=1).mean()),  # the exact set of labels
            "loss": float(loss),
            "label_names": self.labels,
            "per_class": {
                name: {
                    "precision": float(precision[i]),
                    "recall": float(recall[i]),
                    "f1": float(f1[i]) if occurs[i] else math.nan,
                    "support": int(support[i]),
                    "average_precision": average_precision[i],
                    "threshold": float(self.thresholds[i]),
                }
                for i, name in enumerate(self.labels)
            },
        }

    def ratio_parts(self, outputs: Outputs, targets: Targets) -> npt.NDArray[np.float64]:
        """Micro-averaged F1: twice the right labels, over all predicted and true ones."""
        truth = np.asarray(targets) > 0.5
        predicted = sigmoid(np.asarray(outputs)) >= self.thresholds
        both = (truth & predicted).sum(axis=1)
        return np.stack([2.0 * both, truth.sum(axis=1) + predicted.sum(axis=1)], axis=1)

    def scores(self, outputs: Outputs) -> F32:
        return sigmoid(np.asarray(outputs))

    def mean(self, outputs: Sequence[F32]) -> F32:
        mean = np.clip(np.mean([sigmoid(each) for each in outputs], axis=0), 1e-7, 1 - 1e-7)
        return np.asarray(np.log(mean / (1 - mean)), np.float32)

    def choose(self, outputs: Tensor) -> int:
        return int(outputs.argmax())

    def answers(
        self, outputs: Outputs, words: Sequence[Sequence[Word]] | None, options: AnswerOptions
    ) -> list[list[dict[str, Any]]]:
        logits = np.asarray(outputs)
        probabilities = sigmoid(logits)
        limit = self.thresholds if options.threshold is None else options.threshold
        selected = probabilities >= limit  # [n, L]
        shown = logits if options.raw_scores else probabilities
        return [
            [
                {
                    "label": self.labels[i],
                    "score": round(float(shown[row, i]), 6),
                    "selected": bool(selected[row, i]),
                }
                for i in ranking(shown[row])
                if selected[row, i] or (options.all_scores and options.threshold is None)
            ][: options.top_k]
            for row in range(len(logits))
        ]

    def named_scores(self, outputs: F32) -> dict[Any, float]:
        return dict(zip(self.labels, sigmoid(outputs).tolist(), strict=True))

    def decision(self, outputs: F32) -> dict[Any, float]:
        selected = sigmoid(outputs) >= self.thresholds
        scores = self.named_scores(outputs).items()
        return {name: p for (name, p), has in zip(scores, selected, strict=True) if has}

    def tensors(self, outputs: Outputs, words: Sequence[Sequence[Word]] | None) -> list[Tensors]:
        """`selected` and `scores`, [n, L]: whether thresholds are reached, and probabilities."""
        scores = sigmoid(np.asarray(outputs, np.float32).reshape(-1, len(self.labels)))
        shape = [len(outputs) or -1, len(self.labels)]
        rounded = [round(float(score), 6) for score in scores.ravel()]
        selected = (scores >= self.thresholds).ravel().tolist()
        return [
            Tensors("selected", "BOOL", shape, selected),
            Tensors("scores", "FP32", shape, rounded),
        ]

    @classmethod
    def answer_schema(cls) -> type[BaseModel]:
        return LabelDecision

    def columns(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        rows = []
        for answer in answers:
            scores = {each["label"]: each["score"] for each in answer}
            rows.append(
                {
                    "labels": [each["label"] for each in answer if each["selected"]],
                    "scores": {name: scores[name] for name in self.labels if name in scores},
                }
            )
        return rows

    def column_types(self) -> list[pa.Field]:
        scores = pa.struct([pa.field(name, pa.float64()) for name in self.labels])
        return [pa.field("labels", pa.list_(pa.string())), pa.field("scores", scores)]

    def examples(self, outputs: Outputs, targets: Targets) -> list[tuple[int, dict[str, Any]]]:
        """The texts with the most confident wrong decisions."""
        probabilities, truth = sigmoid(np.asarray(outputs)), np.asarray(targets) > 0.5
        selected = probabilities >= self.thresholds
        confidence = np.where(selected, probabilities, 1 - probabilities)
        worst = np.where(selected != truth, confidence, 0.0).max(axis=1, initial=0.0)  # [n]
        return [
            (
                int(row),
                {
                    "label": self._names(truth[row]),
                    "predicted": self._names(selected[row]),
                    "probability": round(float(worst[row]), 4),
                },
            )
            for row in np.argsort(-worst, kind="stable")[:_EXAMPLES]
            if worst[row] > 0
        ]

    def _names(self, chosen: npt.NDArray[np.bool_]) -> str:
        names = [name for name, has in zip(self.labels, chosen, strict=True) if has]
        return ", ".join(names) or "no label"

    def tables(self, metrics: Metrics) -> list[TableData]:
        ratios = ("precision", "recall", "f1", "average_precision", "threshold")
        rows = [
            [
                name,
                *(format_mean(found[ratio]) for ratio in ratios),
                f"{found['support']:,}",
            ]
            for name, found in metrics.get("per_class", {}).items()
        ]
        return [TableData("Scores per label", ["label", *ratios, "rows"], rows)]


def sigmoid(logits: F32) -> F32:
    """Probabilities of logits of any shape, without overflow."""
    return np.asarray(torch.from_numpy(np.ascontiguousarray(logits, np.float32)).sigmoid().numpy())


def best_threshold(probabilities: F32, truth: npt.NDArray[np.bool_]) -> float:
    """The threshold with the highest F1 on rows [n], halfway between two probabilities.

    0.5 where there are too few positive or negative rows to fit one. Of equal ones the nearest to
    0.5.
    """
    positives = int(truth.sum())
    if positives < _MIN_POSITIVES or len(truth) - positives < _MIN_POSITIVES:
        return _DEFAULT_THRESHOLD
    order = np.argsort(-probabilities, kind="stable")
    sorted_probabilities = probabilities[order].astype(np.float64)
    correct = np.cumsum(truth[order])  # [n]: if the first 1, 2, ... rows are selected
    f1 = 2 * correct / (np.arange(1, len(truth) + 1) + positives)
    following = np.append(sorted_probabilities[1:], 0.0)
    is_cut = sorted_probabilities > following  # equal probabilities are selected together
    is_cut[-1] = True
    cuts = (sorted_probabilities + following) / 2
    best = f1[is_cut].max()
    candidates = cuts[is_cut & (f1 >= best - 1e-12)]
    return float(candidates[np.abs(candidates - _DEFAULT_THRESHOLD).argmin()])


def _positive_weights(config: LossSettings, targets: npt.NDArray[Any]) -> Tensor | None:
    """Weights of the positive texts of each label, fp32 [L]; balanced: negatives per positive."""
    if config.class_weights is None:
        return None
    if config.class_weights == "balanced":
        positives = np.nansum(targets, axis=0)  # [L]
        known = (~np.isnan(targets)).sum(axis=0)
        weights = (known - positives) / np.maximum(positives, 1)
        return torch.tensor(np.clip(weights, 1 / _MAX_WEIGHT, _MAX_WEIGHT), dtype=torch.float32)
    return torch.tensor(config.class_weights, dtype=torch.float32)


def _cell(cell: Any) -> str:
    """A cell of a column of 0 and 1 in one spelling."""
    is_null = cell is None or cell != cell  # NaN
    return "null" if is_null else (spell(cell)[0] or "").lower()


def _parse(
    value: Any, names: list[str] | None, separator: str | None
) -> tuple[str | None, str | None]:
    """Return (a JSON list of names, None), or (None, problem)."""
    if isinstance(value, dict):  # columns of 0 and 1
        chosen = []
        for name, cell in value.items():
            text = _cell(cell)
            if text in _TRUE:
                chosen.append(name)
            elif text not in _FALSE:
                return None, f"label is neither 0 nor 1 ({name}={cell!r})"
        return json.dumps(chosen, ensure_ascii=False), None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if value is None or (isinstance(value, float) and value != value):
        return None, "no label"
    if isinstance(value, str):
        parts: list[Any] = value.split(separator) if separator else [value]
    elif isinstance(value, list | tuple | np.ndarray):
        parts = list(value)
    else:
        parts = [value]
    found: dict[str, None] = {}
    for part in parts:
        name, problem = name_of(part, names)
        if name is not None:
            found[name] = None
        elif problem != NO_LABEL_GIVEN:  # an empty name between separators is none
            return None, problem
    return json.dumps(list(found), ensure_ascii=False), None
