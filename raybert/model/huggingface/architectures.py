"""How the two layouts correspond to architectures of `transformers`: model types, fixed values."""

from __future__ import annotations

from raybert.model.settings import HeadConfig, ModelConfig

MODEL_TYPES = {"modern": "modernbert", "classic": "bert"}
RAYBERT_ONLY = "raybert-"  # before the model type, so that transformers refuses to load the model
RAYBERT_CLASSIFIER = "RaybertClassifier"  # the architecture of such a model

#: Values of `config.json` that a layout implies. A directory with another value describes another
#: computation.
IMPLIED_VALUES: dict[str, dict[str, str | bool]] = {
    "modern": {
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "tie_word_embeddings": True,
    },
    "classic": {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
}


def unsupported_by_transformers(head: HeadConfig, model: ModelConfig) -> str | None:
    """Why `transformers` can't load a classifier, and the setting to change; None: it can."""
    if head.kind == "keras":
        return (
            "transformers has no head with 64 ReLU units, so only raybert loads this model; "
            "set head.kind=standard for one that transformers loads"
        )
    pooling = head.pooling_for(model)
    loadable = ("cls", "mean") if model.layout == "modern" else ("cls",)
    if pooling in loadable:
        return None
    return (
        f"transformers does not pool the {model.layout} layout by {pooling}, so only raybert loads "
        f"this model; set head.pooling={' or '.join(loadable)} for one that transformers loads"
    )
