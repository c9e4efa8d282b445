"""`config.json`: written from a model's configuration, read back, and read from other models."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from raybert.config import build
from raybert.errors import DamagedError, UserError
from raybert.model.encoder import Encoder
from raybert.model.huggingface.config_schema import (
    CONFIG_JSON,
    EncoderValues,
    ModelValues,
    RopeParameters,
    check_values,
)
from raybert.model.settings import HeadConfig, ModelConfig
from raybert.storage.folder import Folder

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


#: The dimensions of an encoder: key in `config.json` -> setting.
_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_seq_len",
}
FORMAT_VERSION = 1  # of the `raybert` section
PROBLEM_TYPE = "single_label_classification"


def to_config_json(encoder: Encoder, preprocessing: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything in `config.json` that does not depend on the head."""
    config = encoder.config
    values: dict[str, Any] = {
        "model_type": MODEL_TYPES[config.layout],
        "vocab_size": encoder.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward_size,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.initializer_range,
        "pad_token_id": encoder.pad_id,
        "dtype": "float32",
        **IMPLIED_VALUES[config.layout],
    }
    if config.layout == "modern":
        values |= _modern_values(config)
    else:
        values["layer_norm_eps"] = config.eps
        values["hidden_dropout_prob"] = config.dropout
        values |= {"attention_probs_dropout_prob": 0.0, "type_vocab_size": 1}
    preprocessing = dict(preprocessing or {})
    return {
        **values,
        "raybert": {"format_version": FORMAT_VERSION, "preprocessing": preprocessing},
    }


def _modern_values(config: ModelConfig) -> dict[str, Any]:
    thetas = {
        "full_attention": config.global_rope_theta,
        "sliding_attention": config.local_rope_theta,
    }
    return {
        "norm_eps": config.eps,
        "embedding_dropout": config.dropout,
        "mlp_dropout": config.dropout,
        "attention_dropout": 0.0,
        "initializer_cutoff_factor": 2.0,
        "local_attention": config.local_attention,
        "layer_types": [
            "sliding_attention" if config.is_local(layer) else "full_attention"
            for layer in range(config.num_layers)
        ],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
        # The same for transformers 4.
        "global_attn_every_n_layers": config.global_attention_every,
        "global_rope_theta": config.global_rope_theta,
        "local_rope_theta": config.local_rope_theta,
        # Without these, transformers assumes the ids of ModernBERT's own tokenizer.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
    }


def read_config_json(folder: Folder) -> dict[str, Any]:
    """Read `config.json`; a UserError for one in a newer format."""
    try:
        config = folder.read_json(CONFIG_JSON)
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no model directory: config.json is missing; give the directory that "
            "holds config.json and model.safetensors"
        ) from None
    if not isinstance(config, dict):
        raise DamagedError(f"{folder.join(CONFIG_JSON)} is damaged: it holds no JSON object")
    section = config.get("raybert")
    version = section.get("format_version") if isinstance(section, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{folder} was written by a newer raybert: its model format is {version}, and this "
            f"raybert reads up to {FORMAT_VERSION}; update raybert"
        )
    check_values(ModelValues, config, folder)
    return config


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether raybert computes a model's architecture itself; transformers computes others."""
    return str(config.get("model_type")).removeprefix(RAYBERT_ONLY) in MODEL_TYPES.values()


def read_own_config(folder: Folder) -> tuple[ModelConfig, int]:
    """As `read_model_config`, of an encoder that can be pretrained: one of raybert's layouts."""
    model, vocab_size, _ = from_config_json(folder, read_config_json(folder))
    return model, vocab_size


def read_preprocessing(folder: Folder) -> dict[str, Any]:
    """Read what was saved as `preprocessing`; empty for models that raybert did not write."""
    return dict(read_config_json(folder).get("raybert", {}).get("preprocessing", {}))


def temperature_of(config: Mapping[str, Any]) -> float:
    """The divisor of a classifier's logits that is not in its weights yet.

    1.0 but for models of earlier releases, whose logits `load_classifier` divides.
    """
    return float(config.get("raybert", {}).get("temperature") or 1.0)


def read_temperature(folder: Folder) -> float:
    """Read `temperature_of` a model directory."""
    return temperature_of(read_config_json(folder))


def read_calibration(folder: Folder) -> float | None:
    """Read the temperature that a classifier's probabilities were calibrated with; None: none."""
    section = read_config_json(folder).get("raybert", {})
    found = section.get("calibrated_temperature") or section.get("temperature")
    return None if found is None else float(found)


def read_label_names(folder: Folder) -> list[str]:
    """Read a classifier's labels, in the order of its logits, without reading the weights."""
    config = read_config_json(folder)
    classifiers = ("Classification", RAYBERT_CLASSIFIER)
    named = [str(name).endswith(classifiers) for name in config.get("architectures") or []]
    if not (any(named) if named else "id2label" in config):
        raise no_classification_head(folder, config)
    return label_names(folder, config, len(config.get("id2label") or ("0", "1")))


def no_classification_head(folder: Folder, config: Mapping[str, Any]) -> UserError:
    """The error for a model that is no classifier."""
    return UserError(
        f"{folder} has no classification head (it holds {architecture_of(config)}); "
        "fine-tune it first: raybert finetune"
    )


def label_names(folder: Folder, config: Mapping[str, Any], num_labels: int) -> list[str]:
    """The label of each logit; transformers' default names where `config.json` has none."""
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(num_labels)}
    where = folder.join(CONFIG_JSON)
    if len(names) != num_labels or any(str(i) not in names for i in range(num_labels)):
        raise DamagedError(
            f"{where} is damaged: id2label names {len(names)} labels, and the weights score "
            f"{num_labels}"
        )
    found = [str(names[str(i)]) for i in range(num_labels)]
    [(most, times)] = Counter(found).most_common(1) or [("", 1)]
    if times > 1:
        raise DamagedError(f"{where} is damaged: id2label names the label {most!r} {times} times")
    return found


def is_per_token(config: Mapping[str, Any]) -> bool:
    """Whether a model's head classifies each token, not each text."""
    names = config.get("architectures") or []
    return any(str(name).endswith("ForTokenClassification") for name in names)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture that `config.json` names, for messages."""
    return ", ".join(config.get("architectures") or [str(config.get("model_type"))])


def from_config_json(folder: Folder, config: Mapping[str, Any]) -> tuple[ModelConfig, int, int]:
    """The encoder's configuration, the size of its vocabulary, and the id of the padding token."""
    model_type = str(config.get("model_type")).removeprefix(RAYBERT_ONLY)
    layouts = {name: layout for layout, name in MODEL_TYPES.items()}
    if model_type not in layouts:
        raise UserError(
            f"{folder} holds a model of type {model_type}; of masked language models raybert reads "
            f"{' and '.join(layouts)}; `raybert finetune --from` takes others"
        )
    layout = layouts[model_type]
    where = folder.join(CONFIG_JSON)
    for key, value in IMPLIED_VALUES[layout].items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where}: {key}={reprlib.repr(config[key])} is not supported; "
                f"raybert reads {model_type} with {key}={value!r}"
            )
    found = check_values(EncoderValues, config, folder)
    for key in ("vocab_size", *_SIZES):
        if getattr(found, key) is None:
            raise DamagedError(f"{where} is damaged: {key} is missing")
    values = {
        "layout": layout,
        "initializer_range": found.initializer_range,
        **{ours: getattr(found, theirs) for theirs, ours in _SIZES.items()},
    }
    if layout == "classic":
        values |= {"dropout": found.hidden_dropout_prob, "norm_eps": found.layer_norm_eps}
    else:
        values |= {"dropout": found.mlp_dropout, "norm_eps": found.norm_eps}
        values["local_attention"] = found.local_attention
        values["global_attention_every"] = _global_attention_every(where, found)
        values |= _rope_thetas(where, found)
    assert found.vocab_size is not None
    pad_id = found.pad_token_id or 0
    if pad_id >= found.vocab_size:
        raise DamagedError(
            f"{where} is damaged: pad_token_id={pad_id} is not below vocab_size={found.vocab_size}"
        )
    return build(ModelConfig, values, where), found.vocab_size, pad_id


def _rope_thetas(where: str, found: EncoderValues) -> dict[str, float]:
    """The rotary bases; where `config.json` has none, transformers' defaults."""
    ropes = found.rope_parameters or RopeParameters()
    if any(rope.rope_type != "default" for rope in (ropes.full_attention, ropes.sliding_attention)):
        raise UserError(
            f"{where}: rope_parameters={ropes.model_dump()} is not supported; "
            "raybert reads rope_type='default'"
        )
    full = ropes.full_attention.rope_theta or found.global_rope_theta or 160_000.0
    if "rope_theta" in ropes.sliding_attention.model_fields_set:
        local = ropes.sliding_attention.rope_theta
    elif "local_rope_theta" in found.model_fields_set:
        local = found.local_rope_theta
    else:
        local = 10_000.0
    return {"global_rope_theta": full, "local_rope_theta": local or full}


def _global_attention_every(where: str, found: EncoderValues) -> int:
    """The n for which exactly the layers 0, n, 2n, ... attend globally."""
    kinds = found.layer_types
    if kinds is None:
        return found.global_attn_every_n_layers
    is_global = [kind == "full_attention" for kind in kinds]
    every = is_global.index(True, 1) if True in is_global[1:] else max(1, len(kinds))
    if is_global != [layer % every == 0 for layer in range(len(kinds))]:
        raise UserError(
            f"{where}: layer_types={reprlib.repr(kinds)} is not supported; raybert reads models "
            "in which every n-th layer, from the first on, is full_attention"
        )
    if len(kinds) != found.num_hidden_layers:
        raise DamagedError(
            f"{where} is damaged: layer_types has {len(kinds)} layers and num_hidden_layers is "
            f"{found.num_hidden_layers}"
        )
    return every


def head_config(folder: Folder, config: Mapping[str, Any], model: ModelConfig) -> HeadConfig:
    """Read the configuration of a classification head; `model` is its encoder's."""
    values = dict(config.get("raybert", {}).get("head", {}))
    dropout = config.get("classifier_dropout")
    values["dropout"] = model.dropout if dropout is None else dropout
    if model.layout == "modern":
        values.setdefault("pooling", config.get("classifier_pooling", "cls"))
    return build(HeadConfig, values, folder.join(CONFIG_JSON))
