"""Models as Hugging Face directories, the only format of finished models.

A directory holds `config.json`, `model.safetensors`, the two files of the tokenizer and the model
card. `transformers` loads it as ModernBERT or BERT, without custom code, unless it has what these
lack (`unsupported_by_transformers`); the `raybert` section of `config.json` holds what is ours.
Models of other architectures are computed by `transformers` (`transformers_backend`).
Weights are read from safetensors only: unpickling a `pytorch_model.bin` can run any code. What
reads a directory raises UserError where there is no such model, and DamagedError where a file is
cut short, lacks a value or does not fit the others.
"""

from raybert.model.huggingface.config_json import (
    architecture_of,
    is_own,
    is_per_token,
    read_calibration,
    read_config_json,
    read_label_names,
    read_own_config,
    read_preprocessing,
    read_temperature,
    unsupported_by_transformers,
)
from raybert.model.huggingface.directory import (
    check_encoder,
    check_settings,
    has_masked_lm_head,
    load_classifier,
    load_masked_lm,
    make_classifier_on,
    make_masked_lm_on,
    read_model_config,
)
from raybert.model.huggingface.saving import save_classifier, save_masked_lm
from raybert.model.huggingface.transformers_classifier import TransformersClassifier
from raybert.model.huggingface.weights import (
    Weights,
    check_weights,
    read_weights,
    weight_files,
    weights_hash,
)

__all__ = [
    "TransformersClassifier",
    "Weights",
    "architecture_of",
    "check_encoder",
    "check_settings",
    "check_weights",
    "has_masked_lm_head",
    "is_own",
    "is_per_token",
    "load_classifier",
    "load_masked_lm",
    "make_classifier_on",
    "make_masked_lm_on",
    "read_calibration",
    "read_config_json",
    "read_label_names",
    "read_model_config",
    "read_own_config",
    "read_preprocessing",
    "read_temperature",
    "read_weights",
    "save_classifier",
    "save_masked_lm",
    "unsupported_by_transformers",
    "weight_files",
    "weights_hash",
]
