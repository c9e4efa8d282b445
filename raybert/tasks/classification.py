"""Fine-tuning: a classifier on a pretrained encoder, or from scratch for the comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raybert.data.order import LengthGroupedOrder, assign_to_ranks
from raybert.data.preprocess import pad
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError
from raybert.model import huggingface
from raybert.model.cost import flops_per_token
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier
from raybert.model.settings import HeadConfig, ModelConfig
from raybert.storage.folder import Folder
from raybert.tasks.classification_metrics import classification_scores
from raybert.tasks.objective import Objective
from raybert.tasks.temperature import fit_temperature
from raybert.tasks.texts import NO_LABEL, Prepared, TextBatch, Texts, TextsConfig
from raybert.train.distributed import Group
from raybert.train.run import LoaderConfig
from raybert.train.settings import TrainConfig
from raybert.train.task import Batch

LAYERS = "encoder.layers."


class FinetuneConfig(TextsConfig, TrainConfig):
    """How a classifier is fine-tuned. Pretraining's settings hold, with other defaults."""

    section: ClassVar = "finetune"
    default_epochs: ClassVar = 3

    initialize_from: str = Field(
        "pretrain",
        description="pretrain: the model of this experiment's pretraining; scratch: fresh weights; "
        "or a folder with a model/ of raybert's or of Hugging Face's",
    )
    head: HeadConfig = HeadConfig()
    dropout: float = Field(0.1, ge=0, lt=1, description="in the encoder: texts are seen often")
    frozen_epochs: float = Field(0, ge=0, description="epochs in which only the head learns")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each layer learns this much slower than the one above it"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share spread over all labels")
    class_weights: Literal["balanced"] | list[float] | None = Field(
        None, description="weight of each label's loss; balanced: by inverse frequency"
    )
    r_drop: float = Field(
        0.0,
        ge=0,
        description="weight of the difference between two passes with other dropout (arXiv "
        "2106.14448), as 1; a step takes twice as long",
    )
    adversarial: float = Field(
        0.0,
        ge=0,
        description="weight of what the worst small shift of the embeddings changes (virtual "
        "adversarial training, arXiv 1605.07725), as 1; a step takes three times as long",
    )
    adversarial_size: float = Field(
        0.03, gt=0, description="of that shift, as a share of the embeddings' norm"
    )

    global_batch_size: int = Field(32, ge=1, description="texts in an optimizer step")
    micro_batch_size: int = Field(16, ge=1, description="texts in one forward pass")
    epochs: float | None = Field(None, gt=0, description="limit in passes over the texts")
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    evaluations: int | None = Field(
        None, ge=1, description="evaluations spread evenly over the run; null: after every epoch"
    )

    @model_validator(mode="after")
    def _shifts(self) -> Self:
        if self.compile and self.adversarial > 0:
            raise ValueError(
                f"adversarial={self.adversarial:g} shifts embeddings, which a compiled model does "
                "not notice; set compile=false, or adversarial=0"
            )
        return self


@dataclass(frozen=True)
class SharedInputs:
    """Texts and weights in memory that many runs share instead of reading them from the storage."""

    train: Texts
    validation: Texts
    weights: huggingface.Weights | None  # of the model to start from

    @classmethod
    def read(cls, job: FinetuneSpec) -> SharedInputs:
        """Read what a job's runs need."""
        weights = None if job.start is None else huggingface.read_weights(job.start)
        return cls(*_texts(job), weights)


@dataclass(frozen=True)
class FinetuneSpec:
    """A fine-tuning run, as it travels to workers."""

    config: FinetuneConfig
    model: ModelConfig  # of a fresh encoder
    start: Folder | None  # the model that it starts from; None: from scratch
    tokenizer: Folder  # the folder with the tokenizer's files
    data: Folder
    prepared: Prepared
    shared: SharedInputs | None = None

    def check(self) -> None:
        """Find what would fail later, before any worker starts.

        Raises:
            ConfigError: settings that don't fit each other or the data.
        """
        weights = self.config.class_weights
        names = self.prepared.labels
        if isinstance(weights, list) and len(weights) != len(names):
            raise ConfigError(
                f"finetune.class_weights has {len(weights)} values, the data {len(names)} labels "
                f"({', '.join(names)}); give one weight for each"
            )

    def inputs(self) -> dict[str, str]:
        """The identity of the tokenizer, by which the texts were prepared, and of the weights."""
        found = {"tokenizer": Tokenizer.load(self.tokenizer).hash}
        if self.start is not None:
            found["model to start from"] = huggingface.weights_hash(self.start)
        return found

    def make_task(self, group: Group, feed: LoaderConfig) -> ClassificationTask:
        """Build the task on a worker."""
        return ClassificationTask(self, group)

    def finish(self, task: Any, run: Folder) -> dict[str, Any]:
        """Write `model/` from the weights that are in the task."""
        folder = run / "model"
        huggingface.save_classifier(
            task.model,
            self.prepared.labels,
            self.tokenizer,
            folder,
            card=model_card(self, task.last),
            preprocessing={
                "seq_len": self.prepared.seq_len,
                "head_tokens": self.prepared.head_tokens,
                "html_breaks": self.config.source.html_breaks,
            },
            temperature=task.last.get("temperature"),
        )
        return {"model": folder.uri}


class ClassificationTask:
    """The loop's view of fine-tuning."""

    def __init__(self, job: FinetuneSpec, group: Group) -> None:
        self._job, self._group = job, group
        config = job.config
        self._tokenizer = Tokenizer.load(job.tokenizer)
        train, validation = _texts(job)
        limits = job.prepared.seq_len, job.prepared.head_tokens
        self._texts, self._validation = train.shortened(*limits), validation.shortened(*limits)
        self._order = LengthGroupedOrder(
            self._texts.lengths, config.global_batch_size, config.micro_batch_size, config.seed
        )
        torch.manual_seed(config.seed)
        num_labels = len(job.prepared.labels)
        if job.start is None:
            shape = job.model.model_copy(update={"dropout": config.dropout})
            encoder = Encoder(shape, self._tokenizer.vocab_size, self._tokenizer.pad_id)
            model = Classifier(encoder, num_labels, config.head)
        else:
            model = huggingface.load_encoder_into(
                job.start,
                num_labels,
                config.head,
                config.dropout,
                self._tokenizer.vocab_size,
                weights=None if job.shared is None else job.shared.weights,
            )
        self._model = model.to(group.device)
        self._frozen = False
        self._objective = Objective(
            label_smoothing=config.label_smoothing,
            class_weights=_class_weights(config, self._texts.labels, num_labels),
            r_drop=config.r_drop,
            adversarial=config.adversarial,
            adversarial_size=config.adversarial_size,
            teacher_share=config.distill.share,
            temperature=config.distill.temperature,
        )
        self.last: dict[str, Any] = {}  # the last evaluation

    @property
    def model(self) -> Classifier:
        """The classifier."""
        return self._model

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the texts."""
        return self._order.steps_per_epoch

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over the texts."""
        return int(self._texts.lengths.sum())

    @property
    def flops_per_token(self) -> float:
        """Operations of forward and backward for a token."""
        length = round(float(self._texts.lengths.mean()))
        return flops_per_token(self._model.encoder.config, length, 0, 0.0)

    @property
    def needs_total(self) -> bool:
        """The batches do not depend on the run's length."""
        return False

    def batches(self, first_step: int, total_steps: int | None) -> Iterator[Sequence[Batch]]:
        """Yield this rank's micro-batches, padded to their longest text."""
        order, group = self._order, self._group
        indices = assign_to_ranks(order.micro_batches_per_step, group.world_size)[group.rank]
        for step in itertools.count(first_step):
            batches = [self._batch(step, i, order.micro_batch(step, i)) for i in indices]
            yield [batch for batch in batches if len(batch.row_ids)]

    def _batch(self, step: int, index: int, row_ids: npt.NDArray[np.int64]) -> TextBatch:
        if not len(row_ids):
            return self.empty_batch()
        texts = [self._texts.input_ids[i] for i in row_ids]
        ids, mask = pad(texts, self._tokenizer.pad_id)
        teacher = self._texts.teacher
        return TextBatch(
            step,
            index,
            row_ids,
            ids,
            mask,
            self._texts.labels[row_ids],
            None if teacher is None else teacher[row_ids],
        )

    def empty_batch(self) -> TextBatch:
        """One text that counts for nothing."""
        nothing = np.empty(0, np.int64)
        ids = np.full((1, 2), self._tokenizer.cls_id, np.int64)
        return TextBatch(-1, 0, nothing, ids, None, np.full(1, NO_LABEL, np.int64))

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Sum the loss over a micro-batch's texts."""
        assert isinstance(batch, TextBatch)
        device, teacher = self._group.device, batch.teacher
        return self._objective.loss(
            module,
            self._model,
            *self._inputs(batch.input_ids, batch.attention_mask),
            torch.from_numpy(batch.labels).to(device),
            None if teacher is None else torch.from_numpy(teacher).to(device),
        )

    def _inputs(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_] | None
    ) -> tuple[Tensor, Tensor | None]:
        device = self._group.device
        there = None if mask is None else torch.from_numpy(mask).to(device)
        return torch.from_numpy(ids).to(device), there

    def lr_scale(self, name: str) -> float:
        """Layer-wise decay: the head learns at the full rate, each layer below it slower."""
        layers = self._model.encoder.config.num_layers
        if name.startswith("encoder.embeddings"):
            depth = 0
        elif name.startswith(LAYERS):
            depth = 1 + int(name.removeprefix(LAYERS).partition(".")[0])
        else:
            depth = layers + 1
        return float(self._job.config.layer_decay ** (layers + 1 - depth))

    def prepare(self, step: int) -> bool:
        """Freeze the encoder for the configured epochs."""
        frozen = step < self._job.config.frozen_epochs * self.steps_per_epoch
        changed, self._frozen = frozen != self._frozen, frozen
        if changed:
            self._model.encoder.requires_grad_(not frozen)
        return changed

    def evaluate(self) -> dict[str, Any]:
        """Score the validation texts, every one once."""
        order = np.argsort(self._validation.lengths, kind="stable")
        mine = order[self._group.rank :: self._group.world_size]
        size = 2 * self._job.config.micro_batch_size
        found = []
        for begin in range(0, len(mine), size):
            rows = mine[begin : begin + size]
            texts = [self._validation.input_ids[i] for i in rows]
            logits = self._model(*self._inputs(*pad(texts, self._tokenizer.pad_id)))
            found.append(logits.float().cpu().numpy())
        num_labels = len(self._job.prepared.labels)
        here = np.concatenate(found) if found else np.empty((0, num_labels), np.float32)
        logits = np.empty((len(order), num_labels), np.float32)
        for rows, values in self._group.gather((mine, here)):
            logits[rows] = values
        scores = classification_scores(logits, self._validation.labels, self._job.prepared.labels)
        self.last = {
            # Between equal accuracies the lower loss is better; it never outweighs one text.
            "score": scores["accuracy"] - 1e-3 * min(scores["loss"], 10.0) / len(order),
            **{key: scores[key] for key in ("accuracy", "loss", "f1_macro")},
            "temperature": fit_temperature(logits, self._validation.labels),
        }
        return self.last


def _texts(job: FinetuneSpec) -> tuple[Texts, Texts]:
    """The texts to train on and to choose by, as they are prepared."""
    if job.shared is not None:
        return job.shared.train, job.shared.validation
    prepared = job.prepared
    return Texts.load(job.data, prepared.train), Texts.load(job.data, prepared.validation)


def _class_weights(
    config: FinetuneConfig, labels: npt.NDArray[np.int64], num_labels: int
) -> Tensor | None:
    if config.class_weights is None:
        return None
    if config.class_weights == "balanced":
        labels = labels[labels != NO_LABEL]
        counts = np.bincount(labels, minlength=num_labels)
        return torch.tensor(len(labels) / (num_labels * np.maximum(counts, 1)), dtype=torch.float32)
    return torch.tensor(config.class_weights, dtype=torch.float32)


def model_card(job: FinetuneSpec, metrics: dict[str, Any]) -> str:
    """The README.md of a classifier."""
    source = job.config.source.path
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [raybert]
---
# A classifier of {len(job.prepared.labels)} labels, fine-tuned with raybert

Labels: {", ".join(job.prepared.labels)}.

- Texts: {source} ({job.prepared.train.rows:,} to train on, {job.prepared.validation.rows:,} to
  choose by)
- Started from: {job.start or "fresh weights"}
- Validation accuracy: {metrics.get("accuracy", float("nan")):.4f}, texts of up to
  {job.prepared.seq_len} tokens

`raybert predict --model FOLDER "a text"`
"""
