"""A pretrained masked language model for inference: texts with masks in, probable tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DataError
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.mask_predictions import encode_masked, predict_masks


class MaskFiller:
    """A masked language model with its tokenizer."""

    def __init__(self, folder: Folder, *, device: str = "cpu") -> None:
        """Load a `model/` directory; a UserError if it has no masked language model."""
        self._model = huggingface.load_masked_lm(folder).to(device).eval()
        self._tokenizer = Tokenizer.load(folder)
        self._tokenizer.check(self._model.encoder.vocab_size)
        self.longest = self._model.encoder.config.max_seq_len  # tokens of a text, at most
        settings = huggingface.read_preprocessing(folder)
        self._preprocessing = Preprocessing.read(settings, self.longest)

    @property
    def mask_token(self) -> str:
        """The token to predict, as written in a text: `[MASK]` or similar."""
        return self._tokenizer.mask_token

    def fill(
        self, text: str, top: int, targets: Sequence[str] | None = None
    ) -> list[list[dict[str, Any]]]:
        """Predict each mask of a text: `top` of {"token", "probability"}, best first.

        `targets` are the only words that are considered; of one with several tokens, the first.
        """
        among = None if targets is None else sorted({self._first_id(word) for word in targets})
        cleaned = self._preprocessing.clean(text)
        return predict_masks(self._model, self._tokenizer, cleaned, top, among)

    def _first_id(self, word: str) -> int:
        known = self._tokenizer.hf.token_to_id(word)
        ids = self._tokenizer.hf.encode(word, add_special_tokens=False).ids
        if known is None and not ids:
            raise DataError(f"{word[:60]!r} has no token")
        return int(ids[0] if known is None else known)

    def describe(self, text: str, mask: int, token: str) -> dict[str, Any]:
        """What transformers' pipeline says of a token: its id, its characters, and the sentence."""
        hf = self._tokenizer.hf
        index = int(hf.token_to_id(token) or 0)
        shown = hf.decode([index]) or token
        parts = text.split(self.mask_token)
        before, after = (
            self.mask_token.join(part) for part in (parts[: mask + 1], parts[mask + 1 :])
        )
        return {"token": index, "token_str": shown, "sequence": f"{before}{shown}{after}"}

    def count(self, text: str) -> int:
        """The number of masks in a text; raises as `fill`."""
        _, masks = encode_masked(self._tokenizer, self._preprocessing.clean(text), self.longest)
        return len(masks)
