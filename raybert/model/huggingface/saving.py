"""Write model directories, which transformers loads without custom code where it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raybert.errors import RaybertError
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.huggingface.config_json import (
    PROBLEM_TYPE,
    RAYBERT_CLASSIFIER,
    RAYBERT_ONLY,
    to_config_json,
    unsupported_by_transformers,
)
from raybert.model.huggingface.config_schema import CONFIG_JSON
from raybert.model.huggingface.finite import DIVERGED, check_outputs
from raybert.model.huggingface.transformers_classifier import TransformersClassifier
from raybert.model.huggingface.weights import WEIGHTS_FILE, serialize
from raybert.storage.folder import Folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def _check_before_saving(model: MaskedLM | Classifier, folder: Folder) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RaybertError(f"{folder} is not saved: {name} is not finite: {DIVERGED}")
    check_outputs(model, folder, RaybertError)


def save_masked_lm(
    model: MaskedLM,
    tokenizer: Folder,
    folder: Folder,
    card: str,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write a masked language model to `folder`, with the files of the folder `tokenizer`.

    `card` is the model card, Markdown; `read_preprocessing` returns `preprocessing`, plain JSON.
    RaybertError: the weights have diverged; nothing is written.
    """
    _check_before_saving(model, folder)
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
    architecture: str = "ForSequenceClassification",
    problem_type: str | None = PROBLEM_TYPE,
    task: Mapping[str, Any] | None = None,
    temperature: float | None = None,
) -> None:
    """Write a classifier, as `save_masked_lm`.

    `architecture` is the end of the name of transformers' class. `task` is what a task stores,
    plain JSON. `temperature` divides the logits: the written output layer is divided by it, so that
    the softmax of any program that reads the directory is calibrated. Where `transformers` can't
    load the model, `config.json` and the card contain the reason.
    """
    if len(label_names) != model.num_labels:
        raise ValueError(f"{len(label_names)} label names for {model.num_labels} labels")
    _check_before_saving(model, folder)
    if isinstance(model, TransformersClassifier):
        config = model.config_json(preprocessing)
    else:
        config = to_config_json(model.encoder, preprocessing)
    config["id2label"] = {str(index): name for index, name in enumerate(label_names)}
    config["label2id"] = {name: index for index, name in enumerate(label_names)}
    if problem_type is not None:
        config["problem_type"] = problem_type
    if task is not None:
        config["raybert"]["task"] = dict(task)
    if temperature is not None:
        config["raybert"]["calibrated_temperature"] = temperature
    if isinstance(model, TransformersClassifier):
        return _write(model, config, tokenizer, folder, card, temperature or 1.0)
    config["classifier_dropout"] = model.config.dropout
    unsupported = None
    if not model.per_token:
        unsupported = unsupported_by_transformers(model.config, model.encoder.config)
    if unsupported is not None:
        config["architectures"] = [RAYBERT_CLASSIFIER]
        config["model_type"] = RAYBERT_ONLY + config["model_type"]
        config["raybert"]["only_raybert"] = unsupported
        config["raybert"]["head"] = {"kind": model.config.kind, "pooling": model.pooling}
        if unsupported not in card:
            card = f"{card.rstrip()}\n\n**Note:** {unsupported}.\n"
    elif model.encoder.config.layout == "modern":
        config["architectures"] = [f"ModernBert{architecture}"]
        if not model.per_token:
            config["classifier_pooling"] = model.pooling
    else:
        config["architectures"] = [f"Bert{architecture}"]
    _write(model, config, tokenizer, folder, card, temperature or 1.0)


def _write(
    model: MaskedLM | Classifier,
    config: dict[str, Any],
    tokenizer: Folder,
    folder: Folder,
    card: str,
    temperature: float = 1.0,
) -> None:
    folder.write_bytes(WEIGHTS_FILE, serialize(model, temperature))
    for name in TOKENIZER_FILES:
        folder.write_bytes(name, tokenizer.read_bytes(name))
    values = folder.read_json(TOKENIZER_FILES[1])
    # Pipelines cut texts there with truncation=True, and give the model no token types.
    values["model_max_length"] = model.encoder.config.max_seq_len
    values["model_input_names"] = ["input_ids", "attention_mask"]
    folder.write_json(TOKENIZER_FILES[1], values)
    folder.write_text("README.md", card)
    folder.write_json(CONFIG_JSON, config)  # last: a directory with it is complete
