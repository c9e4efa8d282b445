"""The pretrained model as an object: texts with masks in, likely tokens out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from raybert.model import hub
from raybert.serve import bodies
from raybert.serve.aside import Turn
from raybert.serve.batcher import Failed
from raybert.storage import Folder
from raybert.text.preprocess import Preprocessing
from raybert.text.tokenizer import Tokenizer
from raybert.train.pretrain import fillings, masks

_MOST_TEXTS = 32  # of a request: each is a pass through the model of its own
_MOST_GUESSES = 10_000  # of a request, in all of its masks: 0.5 MB of answer, some 10 ms of JSON


class MaskFiller:
    """A masked language model with its tokenizer."""

    def __init__(self, folder: Folder, *, device: str = "cpu") -> None:
        """Load a `model/` directory.

        Raises:
            UserError: there is no masked language model there.
            DamagedError: a file is cut short or altered.
        """
        self._model = hub.load_masked_lm(folder).to(device).eval()
        self._tokenizer = Tokenizer.load(folder)
        limit = self._model.encoder.config.max_seq_len
        self._preprocessing = Preprocessing.read(hub.read_preprocessing(folder), limit)

    @property
    def mask_token(self) -> str:
        """What stands for a token that is to be guessed."""
        return self._tokenizer.mask_token

    @property
    def longest(self) -> int:
        """Tokens of a text that the model reads."""
        return self._model.encoder.config.max_seq_len

    def fill(self, text: str, top: int) -> list[list[dict[str, Any]]]:
        """Guess each mask of a text: `top` of {"token", "probability"}, the likeliest first.

        Raises:
            DataError: the text has no mask, or is longer than the model reads.
        """
        return fillings(self._model, self._tokenizer, self._preprocessing.clean(text), top)

    def count(self, text: str) -> int:
        """The masks of a text.

        Raises:
            DataError: the text has no mask, or is longer than the model reads.
        """
        _, where = masks(self._model, self._tokenizer, self._preprocessing.clean(text))
        return len(where)


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
        raise bodies.too_large(
            f"{len(texts)} texts are more than the {_MOST_TEXTS} whose masks are filled in a "
            "request"
        )
    guesses = top * await turn.run(lambda: sum(map(filler.count, texts)))
    if guesses > _MOST_GUESSES:
        raise bodies.too_large(
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
