"""A pretrained masked language model for inference: texts with masks in, probable tokens out."""

from __future__ import annotations

from typing import Any

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
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

    def fill(self, text: str, top: int) -> list[list[dict[str, Any]]]:
        """Predict each mask of a text: `top` of {"token", "probability"}, best first."""
        return predict_masks(self._model, self._tokenizer, self._preprocessing.clean(text), top)

    def count(self, text: str) -> int:
        """The number of masks in a text; raises as `fill`."""
        _, masks = encode_masked(self._tokenizer, self._preprocessing.clean(text), self.longest)
        return len(masks)
