"""Regularisation of fine-tuning: R-Drop, virtual adversarial training and distillation.

Distillation (arXiv 1503.02531) adds the divergence from a teacher's probabilities. R-Drop (arXiv
2106.14448) penalises the divergence between two passes with different dropout. Virtual adversarial
training (arXiv 1605.07725) penalises the divergence that an adversarial perturbation of the
embeddings causes.

All passes that contribute gradients go through the model as one batch, because a DDP module is
called once per backward pass.

Shapes: B texts, T tokens, D hidden, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raybert.model.heads import Classifier
from raybert.tasks.protocol import NO_LABEL, Loss

#: Size of the random probe by which the adversarial direction is found, relative to the shift. At a
#: shift of zero the gradient is zero, too; in bf16 a far smaller one drowns in rounding.
_PROBE_SIZE = 0.5

#: Logits of expected and of found predictions -> how far they are apart, for each target.
Divergence = Callable[[Tensor, Tensor], Tensor]


def is_labelled(targets: Tensor) -> Tensor:
    """Whether each target counts: bool [B], or [B, T] for the tags of tokens."""
    return (~targets.isnan()).any(-1) if targets.is_floating_point() else targets != NO_LABEL


@dataclass(frozen=True)
class SupervisedLoss:
    """The loss against labels and, where there is one, a teacher (arXiv 1503.02531).

    Both models' logits are divided by `temperature`. The teacher has a `share` in the loss of a
    labelled text; texts without a label learn from it alone.
    """

    labels: Loss
    divergence: Divergence
    share: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """Sum the loss over the texts: an fp32 scalar."""
        label_loss = self.labels(logits, targets)
        if teacher is None:
            return label_loss
        temperature = self.temperature
        divergence = self.divergence(teacher / temperature, logits / temperature)  # [B]
        weights = torch.where(is_labelled(targets), self.share, 1.0)  # [B]
        # Dividing logits by the temperature divides the gradients by its square.
        return (1 - self.share) * label_loss + temperature**2 * (weights * divergence).sum()


@dataclass(frozen=True)
class RegularizedLoss:
    """The loss of a micro-batch, summed over its texts: a supervised loss and its regularisers."""

    supervised: SupervisedLoss
    divergence: Divergence
    r_drop: float = 0.0  # weight of R-Drop
    adversarial: float = 0.0  # weight of virtual adversarial training
    adversarial_size: float = 0.0  # norm of the shift, as a share of the norm of the embeddings

    def __call__(
        self,
        module: nn.Module,
        model: Classifier,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Run the model and sum the loss; zero where there is neither a label nor a teacher.

        `module` is the model or its DDP wrapper. Input ids int64 [B, T], targets as in `Loss` and
        the teacher's logits fp32 [B, L] -> an fp32 scalar.
        """
        counts = is_labelled(labels)  # [B] or [B, T]: texts, or tokens, that contribute
        if teacher is not None:
            counts = torch.ones_like(counts)
        passes = 1 + (self.r_drop > 0) + (self.adversarial > 0)
        if passes == 1 or not bool(counts.any()):
            return self.supervised(module(input_ids, attention_mask).float(), labels, teacher)
        expected = shift = None
        if self.adversarial > 0:
            expected, shift = adversarial_shift(
                model, input_ids, attention_mask, self.adversarial_size, self.divergence
            )
        mask = None if attention_mask is None else attention_mask.repeat(passes, 1)
        with shifted_embeddings(model, shift, passes):
            logits = module(input_ids.repeat(passes, 1), mask)  # [passes x B, L]
        plain, *others = logits.float().chunk(passes)  # [B, L] each
        total = self.supervised(plain, labels, teacher)
        if self.r_drop > 0:
            second = others.pop(0)
            total = 0.5 * (total + self.supervised(second, labels, teacher))
            # Half of the paper's sum over both passes, which keeps the scale of a step.
            divergence = self.divergence(plain, second) + self.divergence(second, plain)
            total = total + self.r_drop / 4 * (divergence * counts).sum()
        if expected is not None:
            divergence = self.divergence(expected, others.pop(0))
            total = total + self.adversarial * (divergence * counts).sum()
        return total


def adversarial_shift(
    model: Classifier,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    size: float,
    divergence: Divergence,
) -> tuple[Tensor, Tensor]:
    """Find the shift of the embeddings, of a given norm, that changes the predictions most.

    One step of the power method from a random direction (arXiv 1605.07725, section 3.2), without
    dropout. The shift is added after the embeddings' LayerNorm, so that the model can't evade it by
    larger embeddings. `size` is the norm of a text's shift, as a share of that of its embeddings.
    Returns the logits without a shift, [B, L] or [B, T, L], and the shift, [B, T, D], zero at
    padding.
    """
    is_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _record_embeddings(model) as recorded:
            expected = model(input_ids, attention_mask)  # [B, L]
        # Autocast caches the weights that it cast here without gradients; the next pass needs them.
        torch.clear_autocast_cache()
        [embeddings] = recorded  # [B, T, D]
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_token = is_token[..., None].to(embeddings.dtype)  # [B, T, 1]
        norm = size * (embeddings * is_token).flatten(1).norm(dim=1)  # [B]
        probe = _scale_to_norm(torch.randn_like(embeddings) * is_token, _PROBE_SIZE * norm)
        probe.requires_grad_()
        with torch.enable_grad(), shifted_embeddings(model, probe):
            distance = divergence(expected, model(input_ids, attention_mask))  # [B]
            if model.per_token:
                distance = distance * is_token[..., 0]  # [B, T]
            [gradient] = torch.autograd.grad(distance.sum(), probe)
        return expected, _scale_to_norm(gradient * is_token, norm)
    finally:
        model.train(is_training)


@contextmanager
def shifted_embeddings(model: Classifier, shift: Tensor | None, passes: int = 1) -> Iterator[None]:
    """Add a shift [B, T, D] to the embeddings of the last of `passes` copies of a batch."""
    if shift is None:
        yield
        return
    zeros = torch.zeros_like(shift).repeat(passes - 1, 1, 1)
    whole = shift if passes == 1 else torch.cat([zeros, shift])  # [passes x B, T, D]

    def add_shift(norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + whole.to(output.dtype)

    handle = model.encoder.embedding_norm.register_forward_hook(add_shift)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _record_embeddings(model: Classifier) -> Iterator[list[Tensor]]:
    """Collect the normalised embeddings of every pass, [B, T, D] each."""
    recorded: list[Tensor] = []

    def record(norm: nn.Module, inputs: Any, output: Tensor) -> None:
        recorded.append(output.detach())

    handle = model.encoder.embedding_norm.register_forward_hook(record)
    try:
        yield recorded
    finally:
        handle.remove()


def _scale_to_norm(x: Tensor, norm: Tensor) -> Tensor:
    """Scale each text's part of x [B, T, D] to a norm [B]; zeros stay zeros."""
    length: Tensor = x.flatten(1).norm(dim=1).clamp(min=1e-12)
    scale: Tensor = norm / length
    return x * scale[:, None, None]
