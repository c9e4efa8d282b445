"""Ordered labels, such as one to five stars: a wrong label counts by how many steps it is away.

Shapes: n or B texts, L labels in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.tasks.protocol import F32, NO_LABEL, Loss, LossSettings, Metrics, Outputs, Targets
from raybert.tasks.single_label import SingleLabel, sort_key


@dataclass(frozen=True)
class Ordinal(SingleLabel):
    """Cross-entropy and the squared earth mover's distance; the mean distance selects a model."""

    name: ClassVar = "ordinal"
    title: ClassVar = "ordered labels"
    selection_metrics: ClassVar = {
        "mean_distance": False,
        "quadratic_kappa": True,
        "accuracy": True,
        "loss": False,
        "f1_macro": True,
    }

    @classmethod
    def recognizes(cls, texts: Sequence[Any], labels: Sequence[Any]) -> str | None:
        """Only `finetune.task: ordinal` chooses it: integers may be categories."""
        return None

    @classmethod
    def describes(cls, architecture: str, problem_type: str | None, num_labels: int) -> bool:
        return False  # a directory of another origin does not say that its labels are ordered

    @classmethod
    def find_labels(cls, labels: Sequence[str], source: SourceConfig) -> list[str]:
        name = next((label for label in labels if sort_key(label)[0]), None)
        if source.labels is None and name is not None:
            raise DataError(
                f"{', '.join(source.paths)}: the order of labels such as {name!r} is not known; "
                "list all labels from the lowest to the highest in finetune.source.labels"
            )
        return super().find_labels(labels, source)

    def make_loss(self, config: LossSettings, targets: Targets) -> Loss:
        """Add the squared distance of the cumulative distributions (arXiv 1611.05916)."""
        cross_entropy = super().make_loss(config, targets)
        num_labels = len(self.labels)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            is_known = targets != NO_LABEL  # [B]
            truth = F.one_hot(targets.clamp(min=0), num_labels).to(logits)
            gap = logits.softmax(-1).cumsum(-1) - truth.cumsum(-1)  # [B, L]
            return cross_entropy(logits, targets) + (gap.square().sum(-1) * is_known).sum()

        return loss

    def ratio_parts(self, outputs: Outputs, targets: Targets) -> npt.NDArray[np.float64]:
        distance = np.abs(np.asarray(outputs).argmax(axis=1) - np.asarray(targets))
        return np.stack([distance, np.ones(len(distance))], axis=1)

    def _metrics(self, logits: F32, targets: npt.NDArray[np.int64]) -> Metrics:
        """Add the mean distance in steps, and Cohen's kappa with quadratic weights."""
        from sklearn.metrics import cohen_kappa_score  # takes 1.5 s

        found, names = logits.argmax(axis=1), np.arange(len(self.labels))
        one = len(np.unique(np.concatenate([targets, found]))) == 1  # then kappa is 0 / 0
        kappa = 1.0 if one else cohen_kappa_score(targets, found, labels=names, weights="quadratic")
        return {
            **super()._metrics(logits, targets),
            "mean_distance": float(np.abs(found - targets).mean()),
            "quadratic_kappa": float(kappa),
        }
