"""Read encoders and classifiers of other architectures, as RoBERTa, which `transformers` computes.

Code in a directory is never run, and pickles are never opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raybert.config import build
from raybert.errors import ConfigError, DamagedError, RaybertError, UserError, one_line
from raybert.model.huggingface.config_json import (
    MODEL_TYPES,
    architecture_of,
    is_per_token,
    no_classification_head,
)
from raybert.model.huggingface.config_schema import CONFIG_JSON, EncoderValues, check_values
from raybert.model.huggingface.transformers_classifier import TransformersClassifier
from raybert.model.settings import HeadConfig, ModelConfig
from raybert.storage.folder import Folder

_MOST_LAYERS = 1000  # more would take long to make, even without memory
_USUAL_LENGTH = 512  # tokens of a text, for architectures without a limit
#: Keys of `config.json` that transformers must not see: they name code, formats and types of files.
_LEFT_OUT = {"model_type", "raybert", "auto_map", "quantization_config", "dtype", "torch_dtype"}
#: What architectures call the dropout in the encoder, and that before the output layer.
_ENCODER_DROPOUT = ("hidden_dropout_prob", "dropout")
_HEAD_DROPOUT = ("classifier_dropout", "seq_classif_dropout", "classifier_dropout_prob")


def read_shape(folder: Folder, config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """An encoder's sizes and the size of its vocabulary, as `read_model_config`."""
    found = _transformers_config(folder, config)
    return _shape(folder, found, _outline(folder, found, per_token=False)), found.vocab_size


def check_settings(
    config: Mapping[str, Any], head: HeadConfig, *, compiles: bool, recomputes: bool
) -> None:
    """Raise ConfigError for settings of fine-tuning that apply to raybert's own models only."""
    given = {
        "head.kind=keras": head.kind == "keras",
        f"head.pooling={head.pooling}": head.pooling is not None,
        "compile=true": compiles,
        "activation_checkpointing=true": recomputes,
    }
    for setting, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"finetune.{setting} is for raybert's own layers, and transformers computes "
                f"{architecture_of(config)}; leave it out"
            )


def load(
    folder: Folder, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> TransformersClassifier:
    """Make the classifier of a model directory."""
    model, absent = _read(folder, config, tensors, per_token=is_per_token(config))
    if absent:
        raise no_classification_head(folder, config)
    return model


def make_on(
    folder: Folder,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    num_labels: int,
    head: HeadConfig,
    dropout: float | None,
    *,
    per_token: bool,
) -> TransformersClassifier:
    """Make a classifier on a pretrained encoder, as `make_classifier_on`."""
    check_settings(config, head, compiles=False, recomputes=False)
    changes: dict[str, Any] = dict.fromkeys(_HEAD_DROPOUT, head.dropout)
    if dropout is not None:
        changes |= dict.fromkeys(_ENCODER_DROPOUT, dropout)
    labels = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    config = {**config, "id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    model, _ = _read(folder, config, tensors, per_token=per_token, changes=changes)
    nn.init.normal_(model.classifier.weight, std=model.encoder.config.initializer_range)
    if model.classifier.bias is not None:
        nn.init.zeros_(model.classifier.bias)
    return model


def _read(
    folder: Folder,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    per_token: bool,
    changes: Mapping[str, Any] | None = None,
) -> tuple[TransformersClassifier, list[str]]:
    """A classifier with the tensors of a directory, and which of its head's have random values."""
    found = _transformers_config(folder, config)
    for key, value in (changes or {}).items():
        if hasattr(found, key):
            setattr(found, key, value)
    outline = _outline(folder, found, per_token=per_token)
    described = sum(parameter.numel() for parameter in outline.base_model.parameters())
    held = sum(tensor.numel() for tensor in tensors.values())
    if described > 2 * held:  # config.json may ask for any size: before memory is allocated
        raise DamagedError(
            f"{folder}: the weights do not fit config.json: they are {held:,} numbers, and it "
            f"describes an encoder of {described:,}"
        )
    with _errors_named(folder, config):
        model, info = type(outline).from_pretrained(
            None,
            config=found,
            state_dict=dict(tensors),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    base = f"{model.base_model_prefix}."

    def of_encoder(names: Iterable[str]) -> list[str]:  # its pooler belongs to the head
        return sorted(name for name in names if name.startswith(base) and "pooler" not in name)

    shapes = {name: (list(held), list(wanted)) for name, held, wanted in info["mismatched_keys"]}
    for name in of_encoder(shapes):
        held_shape, wanted = shapes[name]
        raise DamagedError(
            f"{folder}: the weights do not fit config.json: {name} has shape {held_shape} in place "
            f"of {wanted}"
        )
    for name in of_encoder(info["missing_keys"]):
        raise DamagedError(f"{folder}: the weights are damaged: {name} is missing")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DamagedError(f"{folder}: {name} has values that are not finite")
    made = TransformersClassifier(
        model, _shape(folder, found, outline), HeadConfig(), per_token=per_token
    )
    with _errors_named(folder, config), torch.no_grad():  # what no shape shows
        made.eval()(torch.zeros(1, 2, dtype=torch.int64))
    return made.train(), [*info["missing_keys"], *shapes]


def _transformers_config(folder: Folder, config: Mapping[str, Any]) -> Any:
    """The configuration of an encoder that transformers classifies texts with.

    Raises:
        UserError: it is of another kind, or transformers is not installed.
        DamagedError: values that transformers or raybert refuse.
    """
    name, own = config.get("model_type"), " and ".join(MODEL_TYPES.values())
    try:
        from transformers import AutoConfig
        from transformers.models.auto import modeling_auto
    except ImportError:
        raise UserError(
            f"{folder} holds a model of type {name}; raybert reads {own}, and other encoders with "
            "transformers: pip install 'raybert[hf]'"
        ) from None
    known = (
        name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    )
    if not known or config.get("is_encoder_decoder"):
        code = ", whose code (auto_map) raybert does not run" if config.get("auto_map") else ""
        raise UserError(
            f"{folder} holds a model of type {name}{code}; raybert reads {own}, and encoders that "
            "transformers itself has for masked tokens and for classification"
        )
    values = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    with _errors_named(folder, config):
        found = AutoConfig.for_model(name, **values)
    if found.num_hidden_layers > _MOST_LAYERS:
        raise DamagedError(
            f"{folder.join(CONFIG_JSON)} is damaged: num_hidden_layers={found.num_hidden_layers}"
        )
    return found


def _auto_class(per_token: bool) -> Any:
    import transformers

    if per_token:
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForSequenceClassification


def _outline(folder: Folder, found: Any, *, per_token: bool) -> Any:
    """The model without memory."""
    with _errors_named(folder, found.to_dict()), torch.device("meta"):
        return _auto_class(per_token).from_config(found)


def _shape(folder: Folder, found: Any, outline: Any) -> ModelConfig:
    """The sizes of an encoder, as those of a classic one."""
    longest = getattr(found, "max_position_embeddings", None) or 0
    embeddings: Any = getattr(outline.base_model, "embeddings", None)
    positions: Any = getattr(embeddings, "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    if padding is not None:  # as in RoBERTa, which counts from there
        longest -= padding + 1
    values = {
        "vocab_size": found.vocab_size,
        "hidden_size": found.hidden_size,
        "num_hidden_layers": found.num_hidden_layers,
        "num_attention_heads": getattr(found, "num_attention_heads", 1),
        "intermediate_size": getattr(found, "intermediate_size", None),
        "max_position_embeddings": longest if longest > 0 else _USUAL_LENGTH,
        "initializer_range": getattr(found, "initializer_range", 0.02),
    }
    checked = check_values(EncoderValues, values, folder)
    settings = {
        "layout": "classic",
        "hidden_size": checked.hidden_size,
        "num_layers": checked.num_hidden_layers,
        "num_heads": checked.num_attention_heads,
        "intermediate_size": checked.intermediate_size,
        "max_seq_len": checked.max_position_embeddings,
        "initializer_range": checked.initializer_range,
    }
    return build(ModelConfig, settings, folder.join(CONFIG_JSON))


@contextmanager
def _errors_named(folder: Folder, config: Mapping[str, Any]) -> Iterator[None]:
    """Raise what goes wrong in transformers as a DamagedError; it prints nothing meanwhile."""
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except RaybertError:
        raise
    except Exception as error:  # of any kind, by architecture
        raise DamagedError(
            f"{folder}: transformers can't make a {config.get('model_type')} of it: "
            f"{one_line(error)}"
        ) from None
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()
