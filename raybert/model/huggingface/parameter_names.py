"""The names of parameters: those of raybert's modules, and those of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable

# raybert -> transformers: replacements that are applied in turn to each name of a state dict.
_MODERN_NAMES = {
    "encoder.embeddings.tokens": "model.embeddings.tok_embeddings",
    "encoder.": "model.",
    "attention_norm": "attn_norm",
    "feed_forward_norm": "mlp_norm",
    "attention.qkv": "attn.Wqkv",
    "attention.out": "attn.Wo",
    "feed_forward.up": "mlp.Wi",
    "feed_forward.down": "mlp.Wo",
    "transform.": "head.",
}
_CLASSIC_NAMES = {
    "encoder.embeddings.tokens": "bert.embeddings.word_embeddings",
    "encoder.embeddings.positions": "bert.embeddings.position_embeddings.weight",
    "encoder.embeddings.token_type": "bert.embeddings.token_type_embeddings.weight",
    "encoder.embeddings.norm": "bert.embeddings.LayerNorm",
    "encoder.layers.": "bert.encoder.layer.",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_norm": "output.LayerNorm",
    "attention.qkv": "attention.self.{}",  # three tensors: query, key, value
    "attention.out.": "attention.output.dense.",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "transform.0": "bert.pooler.dense",
}
_MLM_BIAS = {"modern": "decoder.bias", "classic": "cls.predictions.bias"}
_LAYER = {
    "modern": re.compile(r"model\.layers\.(\d{1,9})\."),
    "classic": re.compile(r"bert\.encoder\.layer\.(\d{1,9})\."),
}


def transformers_names(name: str, layout: str) -> list[str]:
    """Translate a name of our state dict; the classic `qkv` becomes three names."""
    if name == "bias":
        return [_MLM_BIAS[layout]]
    replacements = _MODERN_NAMES if layout == "modern" else _CLASSIC_NAMES
    for ours, theirs in replacements.items():
        name = name.replace(ours, theirs)
    return [name.format(part) for part in ("query", "key", "value")] if "{}" in name else [name]


def layers_in(names: Iterable[str], layout: str) -> int:
    """The number of an encoder's layers, by the largest number in the names of its tensors."""
    numbers = (int(match[1]) for match in map(_LAYER[layout].match, names) if match)
    return 1 + max(numbers, default=-1)
