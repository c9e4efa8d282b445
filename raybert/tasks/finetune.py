"""A fine-tuning run: a model on a pretrained encoder, or from scratch for the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError
from raybert.model import huggingface
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.tasks.classification import Classification, make_class_weights
from raybert.tasks.prepared_texts import PreparedTexts, TokenizedTexts
from raybert.tasks.settings import FinetuneConfig
from raybert.tasks.text_task import TextTask
from raybert.train.distributed import Group
from raybert.train.task import LoaderConfig


@dataclass(frozen=True)
class SharedInputs:
    """Inputs that many runs share in memory instead of reading them from the storage."""

    train: TokenizedTexts
    validation: TokenizedTexts
    weights: huggingface.Weights | None  # of the model to start from

    @classmethod
    def read(cls, spec: FinetuneSpec) -> SharedInputs:
        """Read the inputs of a run."""
        weights = None if spec.start is None else huggingface.read_weights(spec.start)
        return cls(*spec.read_texts(), weights)


@dataclass(frozen=True)
class FinetuneSpec:
    """A fine-tuning run, picklable: the driver sends it to the workers."""

    config: FinetuneConfig
    model: ModelConfig  # of an encoder from scratch
    start: Folder | None  # the model to start from; None: from scratch
    tokenizer: Folder  # the folder with the tokenizer's files
    data: Folder  # the folder of the prepared texts
    prepared: PreparedTexts
    shared: SharedInputs | None = None

    def check(self) -> None:
        """Check the settings against the data, before any worker starts."""
        weights = self.config.class_weights
        names = self.prepared.labels
        if isinstance(weights, list) and len(weights) != len(names):
            raise ConfigError(
                f"finetune.class_weights has {len(weights)} values, the data {len(names)} labels "
                f"({', '.join(names)}); give one weight for each"
            )

    def inputs(self) -> dict[str, str]:
        """Hashes of the tokenizer that prepared the texts, and of the weights to start from."""
        hashes = {"tokenizer": Tokenizer.load(self.tokenizer).hash}
        if self.start is not None:
            hashes["model to start from"] = huggingface.weights_hash(self.start)
        return hashes

    def read_texts(self) -> tuple[TokenizedTexts, TokenizedTexts]:
        """The texts to train on and to validate on, at the length they were prepared with."""
        if self.shared is not None:
            return self.shared.train, self.shared.validation
        files = self.prepared.train, self.prepared.validation
        train, validation = (TokenizedTexts.load(self.data, file) for file in files)
        return train, validation

    def make_task(self, group: Group, loader: LoaderConfig) -> TextTask:
        """Build the task on a worker."""
        config, labels = self.config, self.prepared.labels
        tokenizer = Tokenizer.load(self.tokenizer)
        limits = self.prepared.seq_len, self.prepared.head_tokens
        train, validation = (texts.shortened(*limits) for texts in self.read_texts())
        torch.manual_seed(config.seed)
        model = self._make_model(tokenizer)
        objective = Classification(
            labels,
            make_class_weights(config.class_weights, train.labels, len(labels)),
            config.label_smoothing,
            config.distill.share,
            config.distill.temperature,
        )
        return TextTask(config, group, tokenizer, model, train, validation, objective)

    def _make_model(self, tokenizer: Tokenizer) -> Classifier:
        config, num_labels = self.config, len(self.prepared.labels)
        if self.start is None:
            shape = self.model.model_copy(update={"dropout": config.dropout})
            encoder = Encoder(shape, tokenizer.vocab_size, tokenizer.pad_id)
            return Classifier(encoder, num_labels, config.head)
        weights = None if self.shared is None else self.shared.weights
        size = tokenizer.vocab_size
        return huggingface.load_encoder_into(
            self.start, num_labels, config.head, config.dropout, size, weights=weights
        )

    def finish(self, task: Any, run: Folder, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write `model/` from the weights in the task."""
        folder = run / "model"
        huggingface.save_classifier(
            task.model,
            self.prepared.labels,
            self.tokenizer,
            folder,
            card=model_card(self, metrics),
            preprocessing={
                "seq_len": self.prepared.seq_len,
                "head_tokens": self.prepared.head_tokens,
                "html_breaks": self.config.source.html_breaks,
            },
            temperature=metrics.get("temperature"),
        )
        return {"model": folder.uri}


def model_card(spec: FinetuneSpec, metrics: dict[str, Any]) -> str:
    """The model card of a classifier, Markdown."""
    source = spec.config.source.path
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [raybert]
---
# A classifier of {len(spec.prepared.labels)} labels, fine-tuned with raybert

Labels: {", ".join(spec.prepared.labels)}.

- Texts: {source} ({spec.prepared.train.rows:,} for training,
  {spec.prepared.validation.rows:,} for validation)
- Started from: {spec.start or "random weights"}
- Validation accuracy: {metrics.get("accuracy", float("nan")):.4f}, texts of up to
  {spec.prepared.seq_len} tokens

`raybert predict --model FOLDER "a text"`
"""
