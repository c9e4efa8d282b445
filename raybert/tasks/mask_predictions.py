"""Predict the masked tokens of a text.

Shapes: T tokens, M masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raybert.data.tokenizer import Tokenizer
from raybert.errors import DataError
from raybert.model.heads import MaskedLM


def predict_masks(
    model: MaskedLM,
    tokenizer: Tokenizer,
    text: str,
    top: int = 5,
    among: Sequence[int] | None = None,
) -> list[list[dict[str, Any]]]:
    """The `top` tokens of each mask, {"token", "probability"}, the most probable first.

    `among` are the ids of the tokens that are considered; None: all.
    """
    ids, positions = encode_masked(tokenizer, text, model.encoder.config.max_seq_len)
    device = next(model.parameters()).device
    batch = torch.from_numpy(ids)[None].to(device)  # [1, T]
    with torch.inference_mode():
        logits = model.logits(batch, None, torch.from_numpy(positions).to(device))  # [M, V]
    scores = logits.float().softmax(-1)
    if among is not None:
        kept = torch.tensor(among, device=device)
        scores = torch.full_like(scores, -1.0).index_copy(1, kept, scores[:, kept])
        top = min(top, len(among))
    probabilities, tokens = scores.topk(min(top, scores.shape[-1]))
    return [
        [
            {"token": tokenizer.token_text(int(token)), "probability": round(float(p), 5)}
            for p, token in zip(*row, strict=True)
        ]
        for row in zip(probabilities.tolist(), tokens.tolist(), strict=True)
    ]


def encode_masked(
    tokenizer: Tokenizer, text: str, max_seq_len: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokenize a text: its ids, int64 [T], and the positions of its masks, int64 [M]."""
    ids = tokenizer.encode_masked(text)
    positions = np.flatnonzero(ids == tokenizer.mask_id).astype(np.int64)
    if not len(positions):
        raise DataError(
            f"{text[:60]!r} has no {tokenizer.mask_token}: put one where a word is to be predicted"
        )
    if len(ids) > max_seq_len:
        raise DataError(
            f"the text has {len(ids):,} tokens, the model reads {max_seq_len}; shorten it around "
            f"the {tokenizer.mask_token}"
        )
    return ids, positions
