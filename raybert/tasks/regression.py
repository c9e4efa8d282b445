"""Regression: one or several numbers for each text.

Targets are standardised for training with the mean and standard deviation of the training texts.
The last layer of an exported model gives them in their own unit. Intervals are split-conformal
(Lei et al., arXiv 1604.04173): a quantile of the absolute residuals on the validation texts, which
holds for new texts from the same distribution.

Shapes: n or B texts, L targets.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import BaseModel, Field, FiniteFloat
from torch import Tensor

from raybert.data.sources.row_table import LabelParser
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.model.heads import Classifier
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
from raybert.tasks.suspicions import list_names

_COVERAGE = 0.9  # of intervals
_SAME = 0.25  # standard deviations
_EXAMPLES = 8  # for the report
_F64 = npt.NDArray[np.float64]


class Estimate(AnswerElement):
    """An estimated number, in the unit of the training texts."""

    label: str
    score: float
    low: float | None = Field(None, description="lower end of the 90% interval")
    high: float | None = Field(None, description="upper end of the 90% interval")


@dataclass(frozen=True)
class Regression(TextTask):
    """Squared error of standardised targets; root mean squared error to select a model."""

    name: ClassVar = "regression"
    title: ClassVar = "regression"
    answer_form: ClassVar = "numbers"
    output_kind: ClassVar = "number"
    problem_type: ClassVar = "regression"
    fitted_keys: ClassVar = ("intervals",)
    fitted_types: ClassVar = {
        "mean": list[FiniteFloat],
        "std": list[Annotated[FiniteFloat, Field(gt=0)]],
        "intervals": list[Annotated[FiniteFloat, Field(ge=0)] | None],
    }
    selection_metrics: ClassVar = {
        "rmse": False,
        "mae": False,
        "spearman": True,
        "r2": True,
        "loss": False,
    }
    unused_settings: ClassVar = frozenset(
        {"finetune.label_smoothing", "finetune.class_weights", "finetune.focal_gamma"}
    )
    has_threshold: ClassVar = False

    @classmethod
    def recognizes(cls, texts: Sequence[Any], labels: Sequence[Any]) -> str | None:
        parsed = [_parse(label, None) for label in labels]
        if not parsed or any(problem is not None for _, problem in parsed):
            return None
        numbers = [number for label, _ in parsed for number in json.loads(str(label))]
        # Integers are class numbers more often than quantities, and floats of pandas may be ids.
        has_fraction = any(not number.is_integer() for number in numbers)
        return "labels are numbers with fractions" if has_fraction else None

    @classmethod
    def parser(cls, source: SourceConfig) -> LabelParser:
        count = len(source.label_column) if isinstance(source.label_column, list) else None
        return functools.partial(parse_with, functools.partial(_parse, count=count))

    @classmethod
    def find_labels(cls, labels: Sequence[str], source: SourceConfig) -> list[str]:
        counts = sorted({len(json.loads(label)) for label in labels})
        where = ", ".join(source.paths)
        if len(counts) > 1:
            raise DataError(
                f"{where}: some rows have {counts[0]} numbers and others {counts[-1]}; give every "
                f"row as many in {source.label_column}"
            )
        if source.labels is not None:
            names = source.labels
        elif isinstance(source.label_column, list):
            names = source.label_column
        elif counts == [1]:
            names = [source.label_column]
        else:
            names = [f"{source.label_column}_{i}" for i in range(counts[0])]
        if len(names) != counts[0]:
            raise DataError(
                f"{where}: rows have {counts[0]} numbers, labels names {len(names)}; give one name "
                "for each"
            )
        return names

    def groups(self, labels: Sequence[str]) -> Sequence[str]:
        """Tenths of the first target."""
        values = np.array([json.loads(label)[0] for label in labels])
        edges = np.quantile(values, np.linspace(0, 1, 11)[1:-1])
        return [str(tenth) for tenth in np.searchsorted(edges, values)]

    def targets(self, labels: Sequence[str]) -> npt.NDArray[np.float32]:
        values = [json.loads(label) for label in labels]
        for value in values:
            if len(value) != len(self.labels):
                raise DataError(
                    f"a row has {len(value)} numbers in place of {len(self.labels)} "
                    f"({', '.join(self.labels)})"
                )
        return np.array(values, np.float32).reshape(len(values), len(self.labels))

    def suspicions(
        self, train: Sequence[str], validation: Sequence[str], source: SourceConfig
    ) -> list[str]:
        values = self.targets([*train, *validation])
        constant = [n for i, n in enumerate(self.labels) if np.ptp(values[:, i]) == 0]
        if not constant:
            return []
        return [
            f"every text has the same number in {list_names(constant)}: nothing can be learned "
            "from it; set finetune.source.label_column to another column"
        ]

    def prepare(self, targets: Targets) -> Regression:
        values = np.asarray(targets, np.float64)
        std = np.nanstd(values, axis=0)
        std = np.where(std > 0, std, 1.0)
        mean = np.nanmean(values, axis=0)
        return replace(self, fitted={"mean": mean.tolist(), "std": std.tolist()})

    def _scale(self) -> tuple[_F64, _F64]:
        """Mean and standard deviation of the training targets, [L] each."""
        size = len(self.labels)
        mean = self.fitted.get("mean", [0.0] * size)
        return np.array(mean), np.array(self.fitted.get("std", [1.0] * size))

    def make_loss(self, config: LossSettings, targets: Targets) -> Loss:
        mean, std = (torch.tensor(each, dtype=torch.float32) for each in self._scale())

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            standardised = (targets - mean.to(logits.device)) / std.to(logits.device)
            is_known = ~standardised.isnan()
            error = torch.where(is_known, logits - standardised, 0.0)
            return (error**2).sum() / logits.shape[-1]

        return loss

    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        return ((expected - found) ** 2).mean(-1)

    def export(self, model: Classifier) -> Classifier:
        exported = copy.deepcopy(model)
        mean, std = (
            torch.tensor(each, dtype=torch.float32, device=exported.classifier.weight.device)
            for each in self._scale()
        )
        with torch.no_grad():
            exported.classifier.weight.mul_(std[:, None])
            exported.classifier.bias.mul_(std).add_(mean)
        return exported

    def to_unit(self, outputs: Outputs) -> Outputs:
        mean, std = self._scale()
        return np.asarray(np.asarray(outputs, np.float64) * std + mean, np.float32)

    def from_unit(self, outputs: F32) -> F32:
        mean, std = self._scale()
        return np.asarray((outputs - mean) / std, np.float32)

    def fit(self, outputs: Outputs, targets: Targets) -> Regression:
        residuals = np.abs(np.asarray(outputs, np.float64) - np.asarray(targets))  # [n, L]
        intervals = [_conformal_quantile(column[~np.isnan(column)]) for column in residuals.T]
        return replace(self, fitted={**self.fitted, "intervals": intervals})

    def evaluate(self, outputs: Outputs, targets: Targets) -> Metrics:
        from scipy.stats import spearmanr

        found, truth = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
        per_target = {}
        for i, name in enumerate(self.labels):
            is_known = ~np.isnan(truth[:, i])
            x, y = found[is_known, i], truth[is_known, i]
            error = x - y
            can_rank, varies = len(y) > 1 and np.ptp(y) > 0, len(x) > 1 and np.ptp(x) > 0
            variance = float(np.var(y)) if len(y) else 0.0
            mse = float(np.mean(error**2)) if len(y) else math.nan
            spearman = 0.0 if can_rank else math.nan  # of equal predictions
            per_target[name] = {
                "rmse": math.sqrt(mse),
                "mae": float(np.mean(np.abs(error))) if len(y) else math.nan,
                "spearman": float(spearmanr(x, y).statistic) if can_rank and varies else spearman,
                "r2": 1 - mse / variance if variance > 0 else math.nan,
                "loss": mse / float(self._scale()[1][i]) ** 2,
                "support": len(y),
            }
            interval = self._intervals()[i]
            if interval is not None:
                covered = float(np.mean(np.abs(error) <= interval)) if len(y) else math.nan
                per_target[name] |= {"interval": interval, "coverage": covered}
        means = {
            metric: _mean_of_known([scores[metric] for scores in per_target.values()])
            for metric in self.selection_metrics
        }
        return {"n": len(truth), **means, "label_names": self.labels, "per_target": per_target}

    def _intervals(self) -> list[float | None]:
        """Half the width of each target's interval; None where it is unknown."""
        found: list[float | None] = self.fitted.get("intervals", [None] * len(self.labels))
        return found

    def scores(self, outputs: Outputs) -> Outputs:
        return outputs

    def comparable(self, outputs: Outputs) -> F32:
        """In standard deviations of the training targets."""
        mean, std = self._scale()
        return np.asarray((np.asarray(outputs) - mean) / std, np.float32).ravel()

    def mean(self, outputs: Sequence[F32]) -> F32:
        return np.asarray(np.mean(outputs, axis=0), np.float32)

    def choose(self, outputs: Tensor) -> int:
        return 0

    def answers(
        self, outputs: Outputs, words: Sequence[Sequence[Word]] | None, options: AnswerOptions
    ) -> list[list[dict[str, Any]]]:
        intervals = self._intervals()
        answers = []
        for row in np.asarray(outputs, np.float64):
            answer = []
            for name, value, interval in zip(self.labels, row, intervals, strict=True):
                estimate = {"label": name, "score": round(float(value), 6)}
                if interval is not None:
                    estimate |= {
                        "low": round(float(value - interval), 6),
                        "high": round(float(value + interval), 6),
                    }
                answer.append(estimate)
            answers.append(answer[: options.top_k])
        return answers

    def named_scores(self, outputs: F32) -> dict[Any, float]:
        return dict(zip(self.labels, outputs.tolist(), strict=True))

    def decision(self, outputs: F32) -> dict[Any, float]:
        return self.named_scores(outputs)

    def same_answers(self, before: Outputs, after: Outputs, words: Any) -> npt.NDArray[np.bool_]:
        """Whether all numbers stay within a quarter of their standard deviation."""
        _, std = self._scale()
        moved = np.abs(np.asarray(after) - np.asarray(before)) / std
        return np.asarray((moved <= _SAME).all(axis=1))

    def tensors(self, outputs: Outputs, words: Sequence[Sequence[Word]] | None) -> list[Tensors]:
        """`scores` [n, L], in their unit."""
        rounded = [round(float(value), 6) for row in outputs for value in row]
        return [Tensors("scores", "FP32", [len(outputs) or -1, len(self.labels)], rounded)]

    @classmethod
    def answer_schema(cls) -> type[BaseModel]:
        return Estimate

    def columns(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        rows = []
        for answer in answers:
            row: dict[str, Any] = {}
            for estimate in answer:
                name = estimate["label"]
                row[name] = estimate["score"]
                if "low" in estimate:
                    row |= {f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}
            rows.append(row)
        return rows

    def column_types(self) -> list[pa.Field]:
        has_interval = [interval is not None for interval in self._intervals()]
        ends = ("", "_low", "_high")
        return [
            pa.field(name + end, pa.float64())
            for name, has in zip(self.labels, has_interval, strict=True)
            for end in (ends if has else ends[:1])
        ]

    def examples(self, outputs: Outputs, targets: Targets) -> list[tuple[int, dict[str, Any]]]:
        """The texts with the largest errors, relative to the spread of their target."""
        found, truth = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
        error = np.nan_to_num(np.abs(found - truth) / self._scale()[1]).max(axis=1)  # [n]
        return [
            (int(row), {"label": self._numbers(truth[row]), "predicted": self._numbers(found[row])})
            for row in np.argsort(-error, kind="stable")[:_EXAMPLES]
        ]

    def _numbers(self, values: _F64) -> str:
        if len(values) == 1:
            return f"{values[0]:.5g}"
        return ", ".join(f"{n} {v:.5g}" for n, v in zip(self.labels, values, strict=True))

    def tables(self, metrics: Metrics) -> list[TableData]:
        names = ("rmse", "mae", "spearman", "r2", "interval", "coverage")
        rows = [
            [
                target,
                *("none" if found.get(n) is None else f"{found[n]:.4g}" for n in names),
                f"{found['support']:,}",
            ]
            for target, found in metrics.get("per_target", {}).items()
        ]
        return [TableData("Scores per target", ["target", *names, "rows"], rows)]


def _mean_of_known(values: Sequence[float]) -> float:
    """The mean without targets of which there was nothing to measure; NaN if that are all."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _conformal_quantile(residuals: _F64) -> float | None:
    """The ceil((n + 1) * 0.9)-th smallest of n absolute residuals; None: too few of them."""
    rank = math.ceil((len(residuals) + 1) * _COVERAGE)
    return float(np.sort(residuals)[rank - 1]) if rank <= len(residuals) else None


def _parse(value: Any, count: int | None) -> tuple[str | None, str | None]:
    """Return (a JSON list of numbers, None), or (None, problem)."""
    if isinstance(value, dict):
        values = list(value.values())
    elif isinstance(value, list | tuple | np.ndarray):
        values = list(value)
    else:
        values = [value]
    numbers = []
    for each in values:
        if each is None or (isinstance(each, str) and not each.strip()):
            return None, "no target"
        try:
            number = float(each)
        except (TypeError, ValueError):
            return None, f"target is no number ({str(each)[:40]!r})"
        if not math.isfinite(number):
            return None, f"target is not finite ({number})"
        numbers.append(number)
    if not numbers or (count is not None and len(numbers) != count):
        return None, f"row has {len(numbers)} numbers in place of {count or 'at least one'}"
    return json.dumps(numbers), None
