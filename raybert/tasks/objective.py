"""What fine-tuning minimises: the labels' loss, a teacher's, and what keeps both from overfitting.

R-Drop (arXiv 2106.14448) asks two passes with different dropout to agree. Virtual adversarial
training (arXiv 1605.07725) asks for the same answer after the small shift of the embeddings that
changes it most. Distillation (arXiv 1503.02531) learns a teacher's probabilities.

All passes that are learned from go through the model as one batch: a DDP module is called once
a backward pass.

Shapes: B texts, T tokens, D hidden, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.model.heads import Classifier
from raybert.tasks.texts import NO_LABEL

#: Of the adversarial shift's size, the size of the random one that its direction is found with. At
#: a shift of nothing the slope is nothing, too; in bf16 a far smaller one drowns in rounding.
_PROBE = 0.5


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch, summed over its texts."""

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None  # [L]
    r_drop: float = 0.0
    adversarial: float = 0.0
    adversarial_size: float = 0.0
    teacher_share: float = 0.0
    temperature: float = 1.0

    def loss(
        self,
        module: nn.Module,
        model: Classifier,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Sum the loss.

        Args:
            module: the model, as it may be wrapped.
            model: the model itself.
            input_ids: int64 [B, T].
            attention_mask: bool [B, T] or None, as in `Classifier.forward`.
            labels: int64 [B]; NO_LABEL where a text has none.
            teacher: fp32 [B, L], the teacher's logits; None: there is no teacher.

        Returns:
            An fp32 scalar; zero where there is neither a label nor a teacher.
        """
        counts = labels != NO_LABEL
        if teacher is not None:
            counts = torch.ones_like(counts)
        passes = 1 + (self.r_drop > 0) + (self.adversarial > 0)
        if passes == 1 or not bool(counts.any()):
            return self._supervised(module(input_ids, attention_mask), labels, teacher)
        expected = shift = None
        if self.adversarial > 0:
            expected, shift = adversarial_shift(
                model, input_ids, attention_mask, self.adversarial_size
            )
        mask = None if attention_mask is None else attention_mask.repeat(passes, 1)
        with shifted(model, shift, passes):
            logits = module(input_ids.repeat(passes, 1), mask)
        plain, *others = logits.float().chunk(passes)  # [B, L] each
        total = self._supervised(plain, labels, teacher)
        if self.r_drop > 0:
            second = others.pop(0)
            total = 0.5 * (total + self._supervised(second, labels, teacher))
            one, two = plain.log_softmax(-1), second.log_softmax(-1)
            # Half of the paper's sum over both passes: the scale of a step stays as it was.
            apart = divergence(one, two) + divergence(two, one)
            total = total + self.r_drop / 4 * (apart * counts).sum()
        if expected is not None:
            found = others.pop(0).log_softmax(-1)
            total = total + self.adversarial * (divergence(expected, found) * counts).sum()
        return total

    def _supervised(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """The loss against the labels, and against the teacher."""
        logits = logits.float()
        hard = F.cross_entropy(
            logits,
            labels,
            weight=None if self.class_weights is None else self.class_weights.to(logits.device),
            ignore_index=NO_LABEL,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        if teacher is None:
            return hard
        heat = self.temperature
        soft = divergence((teacher / heat).log_softmax(-1), (logits / heat).log_softmax(-1))
        # A text without a label has nothing but the teacher's answer.
        share = torch.where(labels == NO_LABEL, 1.0, self.teacher_share)
        # The slopes of softened logits are smaller by the square of the temperature.
        return (1 - self.teacher_share) * hard + heat**2 * (share * soft).sum()


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of each row, in nats: log-probabilities [B, L] -> [B]."""
    return (expected.exp() * (expected - found)).sum(-1)


def adversarial_shift(
    model: Classifier, input_ids: Tensor, attention_mask: Tensor | None, size: float
) -> tuple[Tensor, Tensor]:
    """Find the shift of the embeddings, of a given size, that changes the predictions most.

    One step of the power method from a random direction (arXiv 1605.07725, section 3.2), without
    dropout. Embeddings are shifted where they are normalised: larger ones can't outgrow a shift.

    Args:
        model: the model itself, not wrapped.
        input_ids: int64 [B, T].
        attention_mask: bool [B, T] or None.
        size: of a text's shift, as a share of the norm of all its embeddings.

    Returns:
        The log-probabilities without a shift, [B, L], and the shift, [B, T, D]; nothing of it
        is at padding.
    """
    is_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _embeddings(model) as seen:
            expected = model(input_ids, attention_mask).log_softmax(-1)
        # Autocast keeps the weights as it has cast them here: without a way back to the weights.
        torch.clear_autocast_cache()
        [embeddings] = seen
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        there = there[..., None].to(embeddings.dtype)  # [B, T, 1]
        most = size * (embeddings * there).flatten(1).norm(dim=1)  # [B]
        probe = _of_norm(torch.randn_like(embeddings) * there, _PROBE * most)
        probe.requires_grad_()
        with torch.enable_grad(), shifted(model, probe):
            found = model(input_ids, attention_mask).log_softmax(-1)
            [slope] = torch.autograd.grad(divergence(expected, found).sum(), probe)
        return expected, _of_norm(slope * there, most)
    finally:
        model.train(is_training)


@contextmanager
def shifted(model: Classifier, shift: Tensor | None, passes: int = 1) -> Iterator[None]:
    """Add a shift [B, T, D] to the embeddings of the last of `passes` copies of a batch."""
    if shift is None:
        yield
        return
    unmoved = torch.zeros_like(shift).repeat(passes - 1, 1, 1)
    whole = shift if passes == 1 else torch.cat([unmoved, shift])

    def add(norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + whole.to(output.dtype)

    handle = model.encoder.embeddings.norm.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _embeddings(model: Classifier) -> Iterator[list[Tensor]]:
    """Collect the normalised embeddings of every pass."""
    seen: list[Tensor] = []

    def note(norm: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output.detach())

    handle = model.encoder.embeddings.norm.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _of_norm(x: Tensor, norm: Tensor) -> Tensor:
    """Scale each text's part of x [B, T, D] to a norm [B]; nothing stays nothing."""
    length: Tensor = x.flatten(1).norm(dim=1).clamp(min=1e-12)
    scale: Tensor = norm / length
    return x * scale[:, None, None]
