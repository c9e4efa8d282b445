"""Read model directories: those of raybert, and other BERT or ModernBERT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from raybert.errors import DamagedError, UserError
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.huggingface import transformers_backend
from raybert.model.huggingface.config_json import (
    architecture_of,
    from_config_json,
    head_config,
    is_own,
    is_per_token,
    label_names,
    no_classification_head,
    read_config_json,
    read_own_config,
    temperature_of,
)
from raybert.model.huggingface.finite import check_outputs
from raybert.model.huggingface.weights import Source, Weights, read_tensors
from raybert.model.settings import HeadConfig, ModelConfig
from raybert.storage.folder import Folder


def read_model_config(folder: Folder) -> tuple[ModelConfig, int]:
    """Read an encoder's configuration and the size of its vocabulary; the weights are not read."""
    config = read_config_json(folder)
    if is_own(config):
        return read_own_config(folder)
    return transformers_backend.read_shape(folder, config)


def check_settings(
    folder: Folder, head: HeadConfig, *, compiles: bool = False, recomputes: bool = False
) -> None:
    """Raise ConfigError for settings of fine-tuning that a model's architecture has not."""
    config = read_config_json(folder)
    if not is_own(config):
        transformers_backend.check_settings(config, head, compiles=compiles, recomputes=recomputes)


def check_encoder(folder: Folder) -> None:
    """Raise, as loading does, where the weights of an encoder do not fit its `config.json`.

    What fits is built for encoders that transformers computes only, on the CPU.
    """
    config, tensors = read_config_json(folder), read_tensors(folder)
    if is_own(config):
        _settings_that_fit(folder, config, tensors, MaskedLM, ("head.", "bias"))
    else:
        transformers_backend.make_on(
            folder, config, tensors, 2, HeadConfig(), None, per_token=False
        )


def load_masked_lm(folder: Folder, dropout: float | None = None) -> MaskedLM:
    """Read a masked language model; `dropout` replaces the one it was trained with."""
    config = read_config_json(folder)
    tensors = read_tensors(folder)
    if not _has_masked_lm_head(tensors):
        raise UserError(
            f"{folder} has no head that predicts masked tokens (it holds "
            f"{architecture_of(config)}); give a model that was pretrained as a masked language "
            "model"
        )
    model = _make(folder, config, tensors, MaskedLM, dropout=dropout)
    check_outputs(model, folder, DamagedError)
    return model


def make_masked_lm_on(folder: Folder, dropout: float | None = None) -> MaskedLM:
    """As `load_masked_lm`; an encoder without a head that predicts tokens gets a random one.

    The dense layer of that head is the one of a ModernBERT classifier, if the model is such.
    """
    config, tensors = read_config_json(folder), read_tensors(folder)
    if _has_masked_lm_head(tensors):
        return load_masked_lm(folder, dropout)
    return _make(folder, config, tensors, MaskedLM, dropout=dropout, optional=("head.", "bias"))


def has_masked_lm_head(folder: Folder) -> bool:
    """Whether a model has a head that predicts masked tokens."""
    return _has_masked_lm_head(read_tensors(folder))


def _has_masked_lm_head(tensors: Mapping[str, Tensor]) -> bool:
    return any("decoder" in name or "predictions" in name for name in tensors)


def load_classifier(folder: Folder) -> tuple[Classifier, list[str]]:
    """Read a classifier and the names of its labels, in the order of its logits."""
    config = read_config_json(folder)
    tensors = read_tensors(folder)
    if not is_own(config):
        other = transformers_backend.load(folder, config, tensors)
        check_outputs(other, folder, DamagedError)
        return other, label_names(folder, config, other.num_labels)
    weight = tensors.get("classifier.weight")
    if weight is None or not weight.ndim:
        raise no_classification_head(folder, config)
    num_labels = len(weight)
    names = label_names(folder, config, num_labels)

    def make(encoder: Encoder) -> Classifier:
        head = head_config(folder, config, encoder.config)
        return Classifier(encoder, num_labels, head, per_token=is_per_token(config))

    model = _make(folder, config, tensors, make)
    temperature = temperature_of(config)
    with torch.no_grad():
        model.classifier.weight.div_(temperature)
        model.classifier.bias.div_(temperature)
    check_outputs(model, folder, DamagedError)
    return model, names


def make_classifier_on(
    folder: Folder,
    num_labels: int,
    head: HeadConfig,
    dropout: float | None = None,
    vocab_size: int | None = None,
    weights: Weights | None = None,
    *,
    per_token: bool = False,
) -> Classifier:
    """Make a classifier on a pretrained encoder, with a randomly initialized output layer.

    The dense layer of its head is the pretrained one where there is such: ModernBERT's prediction
    head, BERT's pooler. `dropout` replaces the encoder's; `vocab_size` is the tokenizer's;
    `weights` are those of the folder if they were read before.
    """
    config = read_config_json(folder)
    if weights is None:
        tensors = read_tensors(folder)
    else:
        tensors = {name: torch.tensor(array) for name, array in weights.items()}

    def check_vocabulary(encoder: Encoder) -> None:
        if vocab_size is not None and vocab_size > encoder.vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} tokens and the model in {folder} knows "
                f"{encoder.vocab_size}; use the tokenizer that lies beside the model"
            )

    if not is_own(config):
        model = transformers_backend.make_on(
            folder, config, tensors, num_labels, head, dropout, per_token=per_token
        )
        check_vocabulary(model.encoder)
        return model

    def make(encoder: Encoder) -> Classifier:
        check_vocabulary(encoder)
        return Classifier(encoder, num_labels, head, per_token=per_token)

    optional = ("transform.", "classifier.")
    return _make(folder, config, tensors, make, dropout=dropout, optional=optional)


M = TypeVar("M", MaskedLM, Classifier)


def _make(
    folder: Folder,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    make: Callable[[Encoder], M],
    *,
    dropout: float | None = None,
    optional: tuple[str, ...] = (),
) -> M:
    """Make the model that `config.json` describes, and copy tensors into it."""
    settings, vocab_size, pad_id = _settings_that_fit(folder, config, tensors, make, optional)
    if dropout is not None:
        settings = settings.model_copy(update={"dropout": dropout})
    model = make(Encoder(settings, vocab_size, pad_id))
    Source(tensors, folder, settings.layout, optional).copy_into(model)
    return model


def _settings_that_fit(
    folder: Folder,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    make: Callable[[Encoder], MaskedLM | Classifier],
    optional: tuple[str, ...],
) -> tuple[ModelConfig, int, int]:
    """Settings, vocabulary size and padding id of an encoder whose tensors have fitting shapes.

    They are compared on the device meta, with two layers at most, before the model is built:
    `config.json` may ask for any size.
    """
    settings, vocab_size, pad_id = from_config_json(folder, config)
    two = settings.model_copy(update={"num_layers": min(2, settings.num_layers)})
    with torch.device("meta"):
        outline = make(Encoder(two, vocab_size, pad_id))
    Source(tensors, folder, settings.layout, optional).check(outline, settings.num_layers)
    return settings, vocab_size, pad_id
