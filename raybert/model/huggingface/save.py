"""Write model directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raybert.model.heads import Classifier, MaskedLM
from raybert.model.huggingface.architectures import (
    RAYBERT_CLASSIFIER,
    RAYBERT_ONLY,
    unsupported_by_transformers,
)
from raybert.model.huggingface.config_json import CONFIG_JSON, PROBLEM_TYPE, to_config_json
from raybert.model.huggingface.weights import WEIGHTS_FILE, serialize
from raybert.storage.folder import Folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def save_masked_lm(
    model: MaskedLM,
    tokenizer: Folder,
    folder: Folder,
    card: str,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write a masked language model to `folder`, with the files of the folder `tokenizer`.

    `card` is the model card, Markdown; `preprocessing` is how raw texts become tokens (lengths,
    cleaning), plain JSON, which `read_preprocessing` returns.
    """
    config = to_config_json(model.encoder, preprocessing)
    classic = model.encoder.config.layout == "classic"
    config["architectures"] = ["BertForMaskedLM" if classic else "ModernBertForMaskedLM"]
    _write(model, config, tokenizer, folder, card)


def save_classifier(
    model: Classifier,
    label_names: Sequence[str],
    tokenizer: Folder,
    folder: Folder,
    card: str,
    preprocessing: Mapping[str, Any] | None = None,
    temperature: float | None = None,
) -> None:
    """Write a classifier; arguments as in `save_masked_lm`, and `label_names` of the logits.

    `temperature` is the divisor of the logits before the softmax. Where `transformers` can't load
    the model, `config.json` and the card contain the reason.
    """
    if len(label_names) != model.num_labels:
        raise ValueError(f"{len(label_names)} label names for {model.num_labels} labels")
    config = to_config_json(model.encoder, preprocessing)
    config["id2label"] = {str(index): name for index, name in enumerate(label_names)}
    config["label2id"] = {name: index for index, name in enumerate(label_names)}
    config["problem_type"] = PROBLEM_TYPE
    config["classifier_dropout"] = model.config.dropout
    if temperature is not None:
        config["raybert"]["temperature"] = temperature
    unsupported = unsupported_by_transformers(model.config, model.encoder.config)
    if unsupported is not None:
        config["architectures"] = [RAYBERT_CLASSIFIER]
        config["model_type"] = RAYBERT_ONLY + config["model_type"]
        config["raybert"]["only_raybert"] = unsupported
        config["raybert"]["head"] = {"kind": model.config.kind, "pooling": model.pooling}
        if unsupported not in card:
            card = f"{card.rstrip()}\n\n**Note:** {unsupported}.\n"
    elif model.encoder.config.layout == "modern":
        config["architectures"] = ["ModernBertForSequenceClassification"]
        config["classifier_pooling"] = model.pooling
    else:
        config["architectures"] = ["BertForSequenceClassification"]
    _write(model, config, tokenizer, folder, card)


def _write(
    model: MaskedLM | Classifier,
    config: dict[str, Any],
    tokenizer: Folder,
    folder: Folder,
    card: str,
) -> None:
    folder.write_bytes(WEIGHTS_FILE, serialize(model))
    for name in TOKENIZER_FILES:
        folder.write_bytes(name, tokenizer.read_bytes(name))
    folder.write_text("README.md", card)
    folder.write_json(CONFIG_JSON, config)  # last: a directory with it is complete
