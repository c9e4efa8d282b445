"""A fine-tuning run: a model on a pretrained encoder, or from scratch for the comparison."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError
from raybert.model import huggingface
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.lora import add_lora, merged
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.tasks.finetune_task import FinetuneTask
from raybert.tasks.model_cards import ClassifierCard, public_name
from raybert.tasks.prepared_texts import PreparedTexts, check_same_texts
from raybert.tasks.protocol import TextTask
from raybert.tasks.settings import FinetuneConfig
from raybert.tasks.tokenized_texts import TokenizedTexts
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
    order_micro_batch_size: int | None = None  # of the run's first start; None: the configured one

    def check(self) -> None:
        """Check the settings against the data, before any worker starts."""
        task = self.prepared.make_task()
        self._check_that_settings_have_effect(task)
        if self.start is not None:
            huggingface.check_settings(
                self.start,
                self.config.head,
                compiles=self.config.compile,
                recomputes=self.config.activation_checkpointing,
            )
        weights = self.config.class_weights
        names = self.prepared.labels
        if isinstance(weights, list) and len(weights) != len(names):
            raise ConfigError(
                f"finetune.class_weights has {len(weights)} values, the data {len(names)} labels "
                f"({', '.join(names)}); give one weight for each"
            )
        metric = self.config.metric
        if metric is not None and metric not in task.selection_metrics:
            raise ConfigError(
                f"finetune.metric={metric} is no metric of {task.name}; choose one of "
                f"{', '.join(task.selection_metrics)}"
            )
        if self.config.distill.teacher is not None and task.is_per_token:
            raise ConfigError(
                f"finetune.distill.teacher teaches whole texts, and {task.name} tags their tokens; "
                "leave it out"
            )
        if task.is_per_token and self.config.head.kind == "keras":
            raise ConfigError(
                f"finetune.head.kind=keras pools a text, and {task.name} tags its tokens; set "
                "finetune.head.kind=standard"
            )

    def _check_that_settings_have_effect(self, task: TextTask) -> None:
        default = type(self.config)()
        for key in sorted(task.unused_settings):
            path = key.split(".")[1:]
            given, usual = (functools.reduce(getattr, path, c) for c in (self.config, default))
            if given != usual:
                raise ConfigError(f"{key}={given} has no effect on {task.name}; leave it out")

    def inputs(self) -> dict[str, str]:
        """Hashes of the tokenizer that prepared the texts, and of the weights to start from."""
        return hash_inputs(self.start, self.tokenizer)

    def check_sources(self) -> None:
        """Raise DataError if the texts have changed since they were prepared."""
        check_same_texts(self.config, self.data)

    def read_texts(self) -> tuple[TokenizedTexts, TokenizedTexts]:
        """The texts to train on and to validate on, at the length they were prepared with."""
        if self.shared is not None:
            return self.shared.train, self.shared.validation
        files = self.prepared.train, self.prepared.validation
        train, validation = (TokenizedTexts.load(self.data, file) for file in files)
        return train, validation

    def make_task(self, group: Group, loader: LoaderConfig) -> FinetuneTask:
        """Build the task on a worker."""
        tokenizer = Tokenizer.load(self.tokenizer)
        how = Preprocessing(self.prepared.seq_len, self.prepared.head_tokens)
        train, validation = (texts.shortened(how, tokenizer) for texts in self.read_texts())
        torch.manual_seed(self.config.seed)
        model = self._make_model(tokenizer)
        if self.config.lora.rank:
            add_lora(model, self.config.lora.rank, self.config.lora.alpha)
        task = self.prepared.make_task().prepare(train.labels)
        if train.teacher is not None:
            train = replace(train, teacher=task.from_unit(train.teacher))
        size = self.order_micro_batch_size
        return FinetuneTask(self.config, group, tokenizer, model, train, validation, task, size)

    def _make_model(self, tokenizer: Tokenizer) -> Classifier:
        config, num_labels = self.config, len(self.prepared.labels)
        per_token = self.prepared.make_task().is_per_token
        if self.start is None:
            shape = self.model.model_copy(update={"dropout": config.dropout})
            encoder = Encoder(shape, tokenizer.vocab_size, tokenizer.pad_id)
            return Classifier(encoder, num_labels, config.head, per_token=per_token)
        weights = None if self.shared is None else self.shared.weights
        size = tokenizer.vocab_size
        return huggingface.make_classifier_on(
            self.start,
            num_labels,
            config.head,
            config.dropout,
            size,
            weights,
            per_token=per_token,
        )

    def finish(self, task: Any, run: Folder, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write `model/` from the weights in the task."""
        assert isinstance(task, FinetuneTask)
        folder = run / "model"
        # Of the best evaluation, which may have been one before a restart.
        fitted = {
            **task.task.fitted,
            **{k: metrics[k] for k in task.task.fitted_keys if k in metrics},
        }
        temperature = fitted.pop("temperature", None)  # it goes into the weights
        huggingface.save_classifier(
            task.task.export(merged(task.model)),
            self.prepared.labels,
            self.tokenizer,
            folder,
            card=card_of(self, metrics, temperature).render(),
            preprocessing={
                "seq_len": self.prepared.seq_len,
                "head_tokens": self.prepared.head_tokens,
                "html_breaks": "keep" if task.task.is_per_token else self.config.source.html_breaks,
            },
            architecture=task.task.architecture,
            problem_type=task.task.problem_type,
            task={
                "name": task.task.name,
                "fitted": fitted,
                "columns": self.prepared.columns,
            },
            temperature=temperature,
        )
        return {"model": folder.uri}


def hash_inputs(start: Folder | None, tokenizer: Folder) -> dict[str, str]:
    """Hashes of the tokenizer in a folder, and of the weights of the model to start from."""
    hashes = {"tokenizer": Tokenizer.load(tokenizer).hash}
    if start is not None:
        hashes["model to start from"] = huggingface.weights_hash(start)
    return hashes


def card_of(
    spec: FinetuneSpec, metrics: dict[str, Any], temperature: float | None
) -> ClassifierCard:
    """The model card of a fine-tuned model."""
    task = spec.prepared.make_task()
    start = None if spec.start is None else public_name(spec.start.uri)
    return ClassifierCard(
        spec.prepared,
        task,
        spec.config.source.paths,
        start,
        start,
        metrics,
        spec.config.metric or task.default_metric,
        temperature,
    )
