"""Models as Hugging Face directories, the only format of finished models.

A directory holds `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` and
the model card, `README.md`. `transformers` loads it as ModernBERT or BERT, without custom code. The
`raybert` section of `config.json` holds the preprocessing of raw texts, the temperature, and the
head where `transformers` has no equal one. Weights are read from safetensors only: unpickling a
`pytorch_model.bin` can run any code.

What reads a directory raises UserError where there is no such model, or one of another
architecture, head or problem type, and DamagedError where a file is cut short, lacks a value or
does not fit the others.
"""

from raybert.model.huggingface.config_json import (
    read_label_names,
    read_model_config,
    read_preprocessing,
    read_temperature,
    unsupported_by_transformers,
)
from raybert.model.huggingface.directory import (
    load_classifier,
    load_encoder_into,
    load_masked_lm,
    save_classifier,
    save_masked_lm,
)
from raybert.model.huggingface.weights import Weights, check_weights, read_weights, weights_hash

__all__ = [
    "Weights",
    "check_weights",
    "load_classifier",
    "load_encoder_into",
    "load_masked_lm",
    "read_label_names",
    "read_model_config",
    "read_preprocessing",
    "read_temperature",
    "read_weights",
    "save_classifier",
    "save_masked_lm",
    "unsupported_by_transformers",
    "weights_hash",
]
