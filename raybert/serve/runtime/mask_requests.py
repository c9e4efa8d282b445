"""The limits of a request to fill masks, and its tasks: one text each."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from raybert.inference.fill_mask import MaskFiller
from raybert.serve import request_errors
from raybert.serve.runtime.batching import ModelFailed
from raybert.serve.runtime.serial_executor import Slot

_MAX_TEXTS = 32  # of a request: each is a forward pass of its own
_MAX_GUESSES = 10_000  # of a request, over all masks: 0.5 MB of response, some 10 ms of JSON

Filled = list[list[dict[str, Any]]]  # for each mask of a text its guesses: token, probability


async def fill_masks(
    mask_filler: MaskFiller, texts: Sequence[str], top_k: int, slot: Slot
) -> list[Filled]:
    """Return the `top_k` likeliest tokens for each mask of each text.

    Raises:
        RequestError: 413, too many texts or guesses.
        DataError: a text has no mask, or is longer than the model reads.
        ModelFailed: the model raised an exception, or probabilities are not finite.
    """
    if len(texts) > _MAX_TEXTS:
        raise request_errors.too_large(
            f"{len(texts)} texts are more than the {_MAX_TEXTS} whose masks are filled in a request"
        )
    guesses = top_k * await slot.run(lambda: sum(map(mask_filler.count, texts)))
    if guesses > _MAX_GUESSES:
        raise request_errors.too_large(
            f"{guesses:,} guesses are more than the {_MAX_GUESSES:,} that are answered in a "
            "request; send fewer masks, or a smaller top_k"
        )
    return [await slot.run(functools.partial(_fill, mask_filler, text, top_k)) for text in texts]


def _fill(mask_filler: MaskFiller, text: str, top_k: int) -> Filled:
    filled = mask_filler.fill(text, top_k)
    if not all(math.isfinite(guess["probability"]) for mask in filled for guess in mask):
        raise ModelFailed(ValueError("scores are not finite: the weights have diverged"))
    return filled
