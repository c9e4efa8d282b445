"""Single-label classification: what a text task learns, and how it is scored.

Everything that depends on a text having exactly one of L labels stands here and in
`classification_metrics`; `text_task` and `finetune` hold what any task on texts needs.

Shapes: B texts, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.tasks.classification_metrics import classification_scores
from raybert.tasks.distillation import distillation_loss
from raybert.tasks.temperature import fit_temperature
from raybert.tasks.tokenized_texts import NO_LABEL


@dataclass(frozen=True)
class Classification:
    """Cross-entropy against one label a text, and accuracy as the score that selects a model."""

    label_names: list[str]
    class_weights: Tensor | None = None  # fp32 [L]
    label_smoothing: float = 0.0
    teacher_share: float = 0.0  # of the loss of a labelled text
    teacher_temperature: float = 1.0

    def loss(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """Sum the cross-entropy over the labelled texts, and the divergence from a teacher.

        In nats; shapes as in `Objective`. A label is NO_LABEL where a text has none.
        """
        label_loss = F.cross_entropy(
            logits,
            labels,
            weight=None if self.class_weights is None else self.class_weights.to(logits.device),
            ignore_index=NO_LABEL,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        if teacher is None:
            return label_loss
        return distillation_loss(
            label_loss,
            logits,
            teacher,
            labels != NO_LABEL,
            self.teacher_share,
            self.teacher_temperature,
        )

    def evaluate(
        self, logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
    ) -> dict[str, Any]:
        """Compute score (higher is better), accuracy, loss, f1_macro, and fit the temperature."""
        scores = classification_scores(logits, labels, self.label_names)
        return {
            # The loss breaks ties of the accuracy: its weight is below that of one text.
            "score": scores["accuracy"] - 1e-3 * min(scores["loss"], 10.0) / len(labels),
            **{key: scores[key] for key in ("accuracy", "loss", "f1_macro")},
            "temperature": fit_temperature(logits, labels),
        }


def make_class_weights(
    configured: Literal["balanced"] | list[float] | None,
    labels: npt.NDArray[np.int64],
    num_labels: int,
) -> Tensor | None:
    """Weights of the labels in the loss, fp32 [L]; `balanced`: inversely to their frequency."""
    if configured is None:
        return None
    if configured == "balanced":
        labels = labels[labels != NO_LABEL]
        counts = np.bincount(labels, minlength=num_labels)  # [L]
        return torch.tensor(len(labels) / (num_labels * np.maximum(counts, 1)), dtype=torch.float32)
    return torch.tensor(configured, dtype=torch.float32)
