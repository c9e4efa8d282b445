"""Read model directories: those of raybert, and BERT or ModernBERT from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raybert.errors import UserError
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.huggingface.config_json import (
    architecture_of,
    from_config_json,
    head_config,
    label_names,
    no_classification_head,
    read_config_json,
)
from raybert.model.huggingface.weights import Weights, copy_into, read_tensors
from raybert.model.settings import HeadConfig
from raybert.storage.folder import Folder


def load_masked_lm(folder: Folder, dropout: float | None = None) -> MaskedLM:
    """Read a masked language model; `dropout` replaces the one it was trained with."""
    config = read_config_json(folder)
    tensors = read_tensors(folder)
    model = MaskedLM(_fresh_encoder(folder, config, dropout))
    if not any("decoder" in name or "predictions" in name for name in tensors):
        raise UserError(
            f"{folder} has no head that predicts masked tokens (it holds "
            f"{architecture_of(config)}); give a model that was pretrained as a masked language "
            "model"
        )
    copy_into(model, tensors, folder)
    return model


def load_classifier(folder: Folder) -> tuple[Classifier, list[str]]:
    """Read a classifier and the names of its labels, in the order of its logits."""
    config = read_config_json(folder)
    tensors = read_tensors(folder)
    if "classifier.weight" not in tensors:
        raise no_classification_head(folder, config)
    num_labels = len(tensors["classifier.weight"])
    names = label_names(folder, config, num_labels)
    encoder = _fresh_encoder(folder, config)
    model = Classifier(encoder, num_labels, head_config(folder, config, encoder.config))
    copy_into(model, tensors, folder)
    return model, names


def load_encoder_into(
    folder: Folder,
    num_labels: int,
    head: HeadConfig,
    dropout: float | None = None,
    vocab_size: int | None = None,
    weights: Weights | None = None,
) -> Classifier:
    """Make a fresh classifier on a pretrained encoder.

    The dense layer of its head starts from the pretrained one where there is such: ModernBERT's
    prediction head, BERT's pooler. The last layer is always fresh.

    `dropout` replaces the encoder's, which pretraining mostly does without; `vocab_size` is that of
    the tokenizer that will feed it; `weights` are those of the folder if they were read before.
    """
    config = read_config_json(folder)
    if weights is None:
        tensors = read_tensors(folder)
    else:
        tensors = {name: torch.tensor(array) for name, array in weights.items()}
    encoder = _fresh_encoder(folder, config, dropout)
    if vocab_size is not None and vocab_size > encoder.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens and the model in {folder} knows "
            f"{encoder.vocab_size}; use the tokenizer that lies beside the model"
        )
    model = Classifier(encoder, num_labels, head)
    copy_into(model, tensors, folder, fresh=("transform.", "classifier."))
    return model


def _fresh_encoder(
    folder: Folder, config: Mapping[str, Any], dropout: float | None = None
) -> Encoder:
    """Make the encoder that `config.json` describes, with fresh weights."""
    model, vocab_size, pad_id = from_config_json(folder, config)
    if dropout is not None:
        model = model.model_copy(update={"dropout": dropout})
    return Encoder(model, vocab_size, pad_id)
