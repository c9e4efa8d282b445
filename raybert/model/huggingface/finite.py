"""Whether a model's outputs are numbers: weights that have diverged are neither read nor saved."""

from __future__ import annotations

import torch

from raybert.errors import RaybertError
from raybert.model.heads import Classifier, MaskedLM
from raybert.storage.folder import Folder

DIVERGED = "the weights have diverged; take an earlier checkpoint, or train again with a lower lr"


def check_outputs(
    model: MaskedLM | Classifier, folder: Folder, error_type: type[RaybertError]
) -> None:
    """Score a short text once; raise `error_type` if the outputs are not finite."""
    encoder = model.encoder
    length = min(8, encoder.vocab_size, encoder.config.max_seq_len)
    device = next(model.parameters()).device
    ids = torch.arange(encoder.vocab_size - length, encoder.vocab_size, device=device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(model, MaskedLM):
                outputs = model.logits(ids, None, torch.ones_like(ids, dtype=torch.bool))
            else:
                outputs = model(ids)
    finally:
        model.train(was_training)
    if not outputs.isfinite().all():
        raise error_type(f"{folder}: the model's outputs are not finite: {DIVERGED}")
