"""Distillation: the loss against a teacher's probabilities (arXiv 1503.02531).

Shapes: B texts, L labels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of each row, in nats: log-probabilities [B, L] -> [B]."""
    return (expected.exp() * (expected - found)).sum(-1)


def distillation_loss(
    label_loss: Tensor,
    logits: Tensor,
    teacher: Tensor,
    has_label: Tensor,
    share: float,
    temperature: float,
) -> Tensor:
    """Combine the labels' loss with the divergence from the teacher, summed over the texts.

    Both models' logits, fp32 [B, L], are divided by the temperature. The teacher has a `share` in
    the loss of a labelled text; texts without a label (`has_label` [B]) learn from it alone.
    """
    divergence = kl_divergence(
        (teacher / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    )  # [B]
    weights = torch.where(has_label, share, 1.0)  # [B]
    # Dividing logits by the temperature divides the gradients by its square.
    return (1 - share) * label_loss + temperature**2 * (weights * divergence).sum()
