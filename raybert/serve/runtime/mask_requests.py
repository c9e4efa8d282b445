"""Answer a request to fill masks: its limits, and one text after the other in a thread."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from raybert.inference.fill_mask import MaskFiller
from raybert.serve.http import schemas
from raybert.serve.runtime.batching import Failed
from raybert.serve.runtime.serial_executor import Turn

_MOST_TEXTS = 32  # of a request: each is a pass through the model of its own
_MOST_GUESSES = 10_000  # of a request, in all of its masks: 0.5 MB of answer, some 10 ms of JSON


async def fill(
    filler: MaskFiller, texts: Sequence[str], top: int, turn: Turn
) -> list[list[list[dict[str, Any]]]]:
    """Answer a request: for each mask of each text `top` of {"token_str", "score"}.

    Text by text, so that who goes away leaves at most one of them to be computed for nobody.

    Raises:
        Refused: there are too many texts, or guesses.
        DataError: a text has no mask, or is longer than the model reads.
        Failed: the model failed.
    """
    if len(texts) > _MOST_TEXTS:
        raise schemas.too_large(
            f"{len(texts)} texts are more than the {_MOST_TEXTS} whose masks are filled in a "
            "request"
        )
    guesses = top * await turn.run(lambda: sum(map(filler.count, texts)))
    if guesses > _MOST_GUESSES:
        raise schemas.too_large(
            f"{guesses:,} guesses are more than the {_MOST_GUESSES:,} that are answered in a "
            "request; send fewer masks, or a smaller top_k"
        )
    return [await turn.run(functools.partial(_filled, filler, text, top)) for text in texts]


def _filled(filler: MaskFiller, text: str, top: int) -> list[list[dict[str, Any]]]:
    filled = filler.fill(text, top)
    if not all(math.isfinite(guess["probability"]) for mask in filled for guess in mask):
        raise Failed(ValueError("scores are not finite: the weights have diverged"))
    return [
        [{"token_str": guess["token"], "score": guess["probability"]} for guess in mask]
        for mask in filled
    ]
