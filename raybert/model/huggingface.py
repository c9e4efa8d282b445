"""Models as Hugging Face directories, both ways; there is no other format.

A directory holds `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` and
`README.md`, the model card. `transformers` loads it as ModernBERT or BERT, without code of ours.
The `raybert` section of `config.json` has what a raw text needs on its way to the model, and the
head where `transformers` has none like it. Weights are read from safetensors only: unpickling a
`pytorch_model.bin` can run any code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from raybert.config import build
from raybert.errors import DamagedError, UserError
from raybert.model.encoder import Encoder, ModelConfig
from raybert.model.heads import Classifier, HeadConfig, MaskedLM, unsupported_by_transformers
from raybert.storage.folder import Folder

FORMAT_VERSION = 1  # of the `raybert` section

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# Ours -> theirs, applied in turn to each name of a state dict.
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
    "attention.qkv": "attention.self.{}",  # three of theirs: query, key, value
    "attention.out.": "attention.output.dense.",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "transform.0": "bert.pooler.dense",
}
_MLM_BIAS = {"modern": "decoder.bias", "classic": "cls.predictions.bias"}

# What the layouts take for granted: a directory that says otherwise computes something else.
_FIXED = {
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
_MODEL_TYPES = {"modern": "modernbert", "classic": "bert"}
_OURS_ONLY = "raybert-"  # before the model type, so that transformers refuses, not miscalculates


class SavesTokenizer(Protocol):
    """What writes `tokenizer.json` and `tokenizer_config.json`."""

    def save(self, folder: Folder) -> None:
        """Write both files."""


Model = TypeVar("Model", bound=nn.Module)
Weights = Mapping[str, npt.NDArray[Any]]  # by the names in the file


def save_masked_lm(
    model: MaskedLM,
    tokenizer: SavesTokenizer | Folder,
    folder: Folder,
    card: str,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write a masked language model.

    Args:
        model: what to write.
        tokenizer: a tokenizer, or a folder from which its two files are copied.
        folder: where to.
        card: the model card, Markdown.
        preprocessing: what else turns a raw text into tokens (lengths, cleaning): plain JSON that
            `read_preprocessing` returns.
    """
    config = _config_json(model.encoder, preprocessing)
    classic = model.encoder.config.layout == "classic"
    config["architectures"] = ["BertForMaskedLM" if classic else "ModernBertForMaskedLM"]
    _write(model, config, tokenizer, folder, card)


def save_classifier(
    model: Classifier,
    label_names: Sequence[str],
    tokenizer: SavesTokenizer | Folder,
    folder: Folder,
    card: str,
    preprocessing: Mapping[str, Any] | None = None,
    temperature: float | None = None,
) -> None:
    """Write a classifier; arguments as in `save_masked_lm`, and the label of each logit.

    `temperature` is what logits are divided by before they are probabilities. Where `transformers`
    can't load the model, `config.json` and the card say so.
    """
    if len(label_names) != model.num_labels:
        raise ValueError(f"{len(label_names)} label names for {model.num_labels} labels")
    config = _config_json(model.encoder, preprocessing)
    config["id2label"] = {str(index): name for index, name in enumerate(label_names)}
    config["label2id"] = {name: index for index, name in enumerate(label_names)}
    config["problem_type"] = "single_label_classification"
    config["classifier_dropout"] = model.config.dropout
    if temperature is not None:
        config["raybert"]["temperature"] = temperature
    reason = unsupported_by_transformers(model.config, model.encoder.config)
    if reason is None:
        if model.encoder.config.layout == "modern":
            config["architectures"] = ["ModernBertForSequenceClassification"]
            config["classifier_pooling"] = model.pooling
        else:
            config["architectures"] = ["BertForSequenceClassification"]
    else:
        config["architectures"] = ["RaybertClassifier"]
        config["model_type"] = _OURS_ONLY + config["model_type"]
        config["raybert"]["only_raybert"] = reason
        config["raybert"]["head"] = {"kind": model.config.kind, "pooling": model.pooling}
        if reason not in card:
            card = f"{card.rstrip()}\n\n**Note:** {reason}.\n"
    _write(model, config, tokenizer, folder, card)


def load_masked_lm(folder: Folder, dropout: float | None = None) -> MaskedLM:
    """Read a masked language model; `dropout` replaces the one it was trained with.

    Raises:
        UserError: no model there, one of another architecture, or one without this head.
        DamagedError: a file is cut short or does not fit the others.
    """
    config = _read_config(folder)
    tensors = _read_weights(folder)
    model = MaskedLM(_empty_encoder(folder, config, dropout))
    if not any("decoder" in name or "predictions" in name for name in tensors):
        raise UserError(
            f"{folder} has no head that predicts masked tokens (it holds {_kind(config)}); "
            "give a model that was pretrained as a masked language model"
        )
    _fill(model, tensors, folder)
    return model


def load_classifier(folder: Folder) -> tuple[Classifier, list[str]]:
    """Read a classifier and the names of its labels.

    Raises:
        UserError: no model there, one of another architecture, or one without this head.
        DamagedError: a file is cut short or does not fit the others.
    """
    config = _read_config(folder)
    tensors = _read_weights(folder)
    if "classifier.weight" not in tensors:
        raise UserError(
            f"{folder} has no classification head (it holds {_kind(config)}); "
            "fine-tune it first: raybert finetune"
        )
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(
            f"{folder} was trained for problem_type={config['problem_type']}; "
            "raybert reads single_label_classification"
        )
    num_labels = len(tensors["classifier.weight"])
    labels = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(num_labels)}
    if sorted(labels) != sorted(str(i) for i in range(num_labels)):
        raise DamagedError(
            f"{folder.join('config.json')} is damaged: id2label names {len(labels)} labels, "
            f"and {WEIGHTS} scores {num_labels}"
        )
    encoder = _empty_encoder(folder, config)
    model = Classifier(encoder, num_labels, _head_config(folder, config, encoder.config))
    _fill(model, tensors, folder)
    return model, [str(labels[str(i)]) for i in range(num_labels)]


def load_encoder_into(
    folder: Folder,
    num_labels: int,
    head: HeadConfig,
    dropout: float | None = None,
    vocab_size: int | None = None,
    weights: Weights | None = None,
) -> Classifier:
    """Make a fresh classifier on the encoder of a pretrained model.

    The dense layer of its head starts from the pretrained one where there is such: ModernBERT's
    prediction head, BERT's pooler. The last layer is always fresh.

    Args:
        folder: a directory of ours, or of any BERT or ModernBERT.
        num_labels: of the new classifier.
        head: its head.
        dropout: replaces the encoder's, which pretraining mostly does without.
        vocab_size: tokens of the tokenizer that will feed it.
        weights: what `read_weights` has read of the folder; None: they are read now.

    Raises:
        UserError: no model there, one of another architecture, or of a smaller vocabulary.
        DamagedError: a file is cut short or does not fit the others.
    """
    config = _read_config(folder)
    if weights is None:
        tensors = _read_weights(folder)
    else:
        tensors = {name: torch.tensor(array) for name, array in weights.items()}
    encoder = _empty_encoder(folder, config, dropout)
    if vocab_size is not None and vocab_size > encoder.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens and the model in {folder} knows "
            f"{encoder.vocab_size}; use the tokenizer that lies beside the model"
        )
    model = Classifier(encoder, num_labels, head)
    _fill(model, tensors, folder, fresh=("transform.", "classifier."))
    return model


def read_weights(folder: Folder) -> Weights:
    """Read a model's weights as arrays, which many processes can share.

    Raises:
        UserError: no weights there.
        DamagedError: the file is cut short.
    """
    return {name: tensor.numpy() for name, tensor in _read_weights(folder).items()}


def read_shape(folder: Folder) -> tuple[ModelConfig, int]:
    """Read an encoder's shape and the size of its vocabulary off `config.json`; no weights.

    Raises:
        UserError: no model there, or one of another architecture.
        DamagedError: `config.json` lacks a value.
    """
    config = _read_config(folder)
    try:
        return _model_config(folder, config), int(config["vocab_size"])
    except KeyError as error:
        raise DamagedError(
            f"{folder.join('config.json')} is damaged: {error.args[0]} is missing"
        ) from None


def read_preprocessing(folder: Folder) -> dict[str, Any]:
    """Read what was given as `preprocessing` on saving; empty for models of others.

    Raises:
        UserError: no model there.
    """
    return dict(_read_config(folder).get("raybert", {}).get("preprocessing", {}))


def read_temperature(folder: Folder) -> float:
    """Read what a classifier's logits are divided by; 1.0 for models that don't say.

    Raises:
        UserError: no model there.
        DamagedError: it is no positive number.
    """
    value = _read_config(folder).get("raybert", {}).get("temperature", 1.0)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DamagedError(
            f"{folder.join('config.json')} is damaged: temperature={value!r} is no positive number"
        )
    return float(value)


def weights_hash(folder: Folder) -> str:
    """SHA-256 of a model's weights; empty where there are none, which loading says better."""
    try:
        return hashlib.sha256(folder.read_bytes(WEIGHTS)).hexdigest()
    except FileNotFoundError:
        return ""


# Writing


def _config_json(encoder: Encoder, preprocessing: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything in `config.json` that does not depend on the head."""
    config = encoder.config
    values: dict[str, Any] = {
        "model_type": _MODEL_TYPES[config.layout],
        "vocab_size": encoder.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward_size,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.initializer_range,
        "pad_token_id": encoder.pad_id,
        "dtype": "float32",
        **_FIXED[config.layout],
    }
    if config.layout == "classic":
        values |= {
            "layer_norm_eps": config.eps,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
            "type_vocab_size": 1,
        }
    else:
        kinds = [
            "sliding_attention" if config.is_local(layer) else "full_attention"
            for layer in range(config.num_layers)
        ]
        thetas = {
            "full_attention": config.global_rope_theta,
            "sliding_attention": config.local_rope_theta,
        }
        values |= {
            "norm_eps": config.eps,
            "embedding_dropout": config.dropout,
            "mlp_dropout": config.dropout,
            "attention_dropout": 0.0,
            "initializer_cutoff_factor": 2.0,
            "local_attention": config.local_attention,
            "layer_types": kinds,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta}
                for kind, theta in thetas.items()
            },
            # The same for transformers 4.
            "global_attn_every_n_layers": config.global_attention_every,
            "global_rope_theta": config.global_rope_theta,
            "local_rope_theta": config.local_rope_theta,
            # Unsaid, these would be the ids of ModernBERT's own tokenizer.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        }
    values["raybert"] = {
        "format_version": FORMAT_VERSION,
        "preprocessing": dict(preprocessing or {}),
    }
    return values


def _write(
    model: MaskedLM | Classifier,
    config: dict[str, Any],
    tokenizer: SavesTokenizer | Folder,
    folder: Folder,
    card: str,
) -> None:
    layout = model.encoder.config.layout
    tensors = {}
    for name, tensor in model.state_dict().items():
        theirs = _their_names(name, layout)
        for part, piece in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            tensors[part] = piece.detach().cpu().float().contiguous()
    folder.write_bytes(WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
    if isinstance(tokenizer, Folder):
        for name in TOKENIZER_FILES:
            folder.write_bytes(name, tokenizer.read_bytes(name))
    else:
        tokenizer.save(folder)
    folder.write_text("README.md", card)
    folder.write_json("config.json", config)  # last: where it is, the rest is


def _their_names(name: str, layout: str) -> list[str]:
    """Translate a name of our state dict; the classic `qkv` is three of theirs."""
    if name == "bias":
        return [_MLM_BIAS[layout]]
    for ours, theirs in (_MODERN_NAMES if layout == "modern" else _CLASSIC_NAMES).items():
        name = name.replace(ours, theirs)
    return [name.format(part) for part in ("query", "key", "value")] if "{}" in name else [name]


# Reading


def _read_config(folder: Folder) -> dict[str, Any]:
    try:
        config = folder.read_json("config.json")
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no model directory: config.json is missing; give the directory that "
            "holds config.json and model.safetensors"
        ) from None
    if not isinstance(config, dict):
        raise DamagedError(f"{folder.join('config.json')} is damaged: it holds no JSON object")
    version = config.get("raybert", {}).get("format_version", FORMAT_VERSION)
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder} was written by a newer raybert: its model format is {version}, and this "
            f"raybert reads up to {FORMAT_VERSION}; update raybert"
        )
    return config


def _read_weights(folder: Folder) -> dict[str, Tensor]:
    """Read `model.safetensors` as fp32, under the names that transformers gives today."""
    try:
        tensors = safetensors.torch.load(folder.read_bytes(WEIGHTS))
    except FileNotFoundError:
        if folder.exists("pytorch_model.bin"):
            raise UserError(
                f"{folder} holds pytorch_model.bin, which raybert does not open: unpickling it can "
                f"run any code; convert it with transformers' save_pretrained to {WEIGHTS}"
            ) from None
        raise UserError(
            f"{folder} has no weights: {WEIGHTS} is missing; copy it there, beside config.json"
        ) from None
    except SafetensorError as error:
        raise DamagedError(f"{folder.join(WEIGHTS)} is damaged: {error}") from None
    # BERT's first checkpoints still have TensorFlow's names for a norm's parameters.
    return {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): tensor.float()
        for name, tensor in tensors.items()
    }


def _empty_encoder(folder: Folder, config: dict[str, Any], dropout: float | None = None) -> Encoder:
    """Make the encoder that `config.json` describes; its weights come later."""
    try:
        model = _model_config(folder, config)
        if dropout is not None:
            model = model.model_copy(update={"dropout": dropout})
        return Encoder(model, config["vocab_size"], config.get("pad_token_id") or 0)
    except KeyError as error:
        raise DamagedError(
            f"{folder.join('config.json')} is damaged: {error.args[0]} is missing"
        ) from None


def _model_config(folder: Folder, config: dict[str, Any]) -> ModelConfig:
    model_type = str(config.get("model_type")).removeprefix(_OURS_ONLY)
    layouts = {name: layout for layout, name in _MODEL_TYPES.items()}
    if model_type not in layouts:
        raise UserError(
            f"{folder} holds a model of type {model_type}; raybert reads {' and '.join(layouts)}"
        )
    layout = layouts[model_type]
    for key, value in _FIXED[layout].items():
        if config.get(key, value) != value:
            raise UserError(
                f"{folder.join('config.json')}: {key}={config[key]!r} is not supported; "
                f"raybert reads {model_type} with {key}={value!r}"
            )
    values = {
        "layout": layout,
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "initializer_range": config.get("initializer_range", 0.02),
    }
    if layout == "classic":
        values["dropout"] = config.get("hidden_dropout_prob", 0.1)
        values["norm_eps"] = config.get("layer_norm_eps", 1e-12)
    else:
        rope = config.get("rope_parameters") or {}
        full, local = (rope.get(kind, {}) for kind in ("full_attention", "sliding_attention"))
        if any(kind.get("rope_type", "default") != "default" for kind in (full, local)):
            raise UserError(
                f"{folder.join('config.json')}: rope_parameters={rope} is not supported; "
                "raybert reads rope_type='default'"
            )
        values["dropout"] = config.get("mlp_dropout", 0.0)
        values["norm_eps"] = config.get("norm_eps", 1e-5)
        values["local_attention"] = config.get("local_attention", 128)
        values["global_attention_every"] = _global_every(folder, config)
        # transformers' own defaults, for directories that do not say
        values["global_rope_theta"] = full.get(
            "rope_theta", config.get("global_rope_theta", 160_000.0)
        )
        values["local_rope_theta"] = (
            local.get("rope_theta", config.get("local_rope_theta", 10_000.0))
            or values["global_rope_theta"]
        )
    return build(ModelConfig, values, folder.join("config.json"))


def _global_every(folder: Folder, config: dict[str, Any]) -> int:
    """Find n where layers 0, n, 2n, ... attend globally."""
    kinds = config.get("layer_types")
    if kinds is None:
        return int(config.get("global_attn_every_n_layers", 3))
    for every in range(1, len(kinds) + 1):
        if all((kind != "full_attention") == (i % every != 0) for i, kind in enumerate(kinds)):
            return every
    raise UserError(
        f"{folder.join('config.json')}: layer_types={kinds} is not supported; raybert reads models "
        "in which every n-th layer, from the first on, is full_attention"
    )


def _head_config(folder: Folder, config: dict[str, Any], model: ModelConfig) -> HeadConfig:
    values = dict(config.get("raybert", {}).get("head", {}))
    dropout = config.get("classifier_dropout")
    values["dropout"] = model.dropout if dropout is None else dropout
    if model.layout == "modern":
        values.setdefault("pooling", config.get("classifier_pooling", "cls"))
    return build(HeadConfig, values, folder.join("config.json"))


def _fill(
    model: MaskedLM | Classifier,
    tensors: dict[str, Tensor],
    folder: Folder,
    fresh: tuple[str, ...] = (),
) -> None:
    """Copy the weights into the model; those under `fresh` only where they fit, others must."""
    layout = model.encoder.config.layout
    base = "model." if layout == "modern" else "bert."
    if not any(name.startswith(base) for name in tensors):  # saved from the encoder alone
        tensors = {base + name: tensor for name, tensor in tensors.items()}
    state = model.state_dict()
    for name, target in state.items():
        theirs = _their_names(name, layout)
        if name.startswith("classifier.") and fresh:
            continue
        missing = [part for part in theirs if part not in tensors]
        if missing and name.startswith(fresh):
            continue
        if missing:
            raise DamagedError(f"{folder.join(WEIGHTS)} is damaged: {missing[0]} is missing")
        source = torch.cat([tensors[part] for part in theirs])
        if name == "encoder.embeddings.token_type":
            source = source[:1]  # the first segment's
        if source.shape != target.shape:
            if name.startswith(fresh):
                continue
            raise DamagedError(
                f"{folder.join(WEIGHTS)} does not fit config.json: {theirs[0]} has shape "
                f"{list(source.shape)} in place of {list(target.shape)}"
            )
        target.copy_(source)


def _kind(config: dict[str, Any]) -> str:
    return ", ".join(config.get("architectures") or [str(config.get("model_type"))])
