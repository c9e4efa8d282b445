"""Fine-tuning on labelled texts, for the training loop, whatever is learned from them.

It batches texts of similar length, freezes the encoder for the first epochs, decays learning rates
by layer, and gathers the validation logits of all ranks. A `TextTask` has loss and metrics.

Shapes: B texts, T tokens, L outputs of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raybert.data.order import LengthGroupedOrder, assign_to_ranks
from raybert.data.preprocess import pad
from raybert.data.tokenizer import Tokenizer
from raybert.model.cost import flops_per_token
from raybert.model.heads import Classifier
from raybert.model.layers import layer_number
from raybert.records import Metrics
from raybert.tasks.protocol import NO_LABEL, TextTask
from raybert.tasks.regularization import RegularizedLoss, SupervisedLoss
from raybert.tasks.settings import FinetuneConfig
from raybert.tasks.tokenized_texts import TextBatch, TokenizedTexts, rows_of_length
from raybert.train.distributed import Group
from raybert.train.task import Batch


class FinetuneTask:
    """A task on labelled texts, for the training loop."""

    def __init__(
        self,
        config: FinetuneConfig,
        group: Group,
        tokenizer: Tokenizer,
        model: Classifier,
        train: TokenizedTexts,
        validation: TokenizedTexts,
        task: TextTask,
        order_micro_batch_size: int | None = None,
    ) -> None:
        self._config, self._group, self._tokenizer = config, group, tokenizer
        self._train, self._validation = train, validation
        lengths = train.lengths
        self._order = LengthGroupedOrder(
            lengths,
            config.global_batch_size,
            order_micro_batch_size or config.micro_batch_size,
            config.seed,
        )
        self.model = model.to(group.device)
        self.task = task
        self._loss = RegularizedLoss(
            SupervisedLoss(
                task.make_loss(config, train.labels),
                task.divergence,
                config.distill.share,
                config.distill.temperature,
            ),
            task.divergence,
            config.r_drop,
            config.adversarial,
            config.adversarial_size,
        )
        self._is_frozen = False
        #: What learns when the encoder is not frozen: all of it, or adapters.
        self._trained = [p for p in model.encoder.parameters() if p.requires_grad]
        self.steps_per_epoch = self._order.steps_per_epoch
        self.tokens_per_epoch = int(lengths.sum())
        self.flops_per_token = flops_per_token(model.encoder.config, round(float(lengths.mean())))
        self.needs_total = False  # batches do not depend on the run's length

    def batches(self, first_step: int, total_steps: int | None) -> Iterator[Sequence[Batch]]:
        """Yield this rank's micro-batches, padded to their longest text."""
        order, group = self._order, self._group
        indices = assign_to_ranks(order.micro_batches_per_step, group.world_size)[group.rank]
        for step in itertools.count(first_step):
            row_ids = {index: order.micro_batch(step, index) for index in indices}
            yield [self._batch(step, index, ids) for index, ids in row_ids.items() if len(ids)]

    def _batch(
        self, step: int, micro_batch_index: int, row_ids: npt.NDArray[np.int64]
    ) -> TextBatch:
        texts = [self._train.input_ids[i] for i in row_ids]
        input_ids, attention_mask = pad(texts, self._tokenizer.pad_id)
        teacher = self._train.teacher
        labels = self._train.targets(row_ids)
        logits = None if teacher is None else teacher[row_ids]
        return TextBatch(
            step, micro_batch_index, row_ids, input_ids, attention_mask, labels, logits
        )

    def empty_batch(self) -> TextBatch:
        """A text without a label, whose loss and gradients are zero."""
        no_rows = np.empty(0, np.int64)
        input_ids = np.full((1, 2), self._tokenizer.cls_id, np.int64)
        per_token = np.full((1, 2), NO_LABEL, np.int64)
        targets = per_token if self.task.is_per_token else self.task.no_targets(1)
        return TextBatch(-1, 0, no_rows, input_ids, None, targets)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Sum the loss over a micro-batch's texts."""
        assert isinstance(batch, TextBatch)
        device, teacher = self._group.device, batch.teacher
        return self._loss(
            module,
            self.model,
            *self._to_device(batch.input_ids, batch.attention_mask),
            torch.from_numpy(batch.labels).to(device),
            None if teacher is None else torch.from_numpy(teacher).to(device),
        )

    def _to_device(
        self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.bool_] | None
    ) -> tuple[Tensor, Tensor | None]:
        device = self._group.device
        mask = None if attention_mask is None else torch.from_numpy(attention_mask).to(device)
        return torch.from_numpy(input_ids).to(device), mask

    def lr_scale(self, name: str) -> float:
        """Layer-wise decay: the head learns at the full rate, each layer below it slower."""
        layers, layer = self.model.encoder.config.num_layers, layer_number(name)
        depth = layers + 1
        if layer is not None:
            depth = 1 + layer
        elif "embedding" in name:
            depth = 0
        return float(self._config.layer_decay ** (layers + 1 - depth))

    def prepare(self, step: int) -> bool:
        """Freeze the encoder for the configured epochs; return whether that changed."""
        is_frozen = step < self._config.frozen_epochs * self.steps_per_epoch
        changed, self._is_frozen = is_frozen != self._is_frozen, is_frozen
        if changed:
            for parameter in self._trained:
                parameter.requires_grad_(not is_frozen)
        return changed

    def evaluate(self) -> Metrics:
        """Score the validation texts, each one once, with all ranks together."""
        by_length = np.argsort(self._validation.lengths, kind="stable")
        mine = by_length[self._group.rank :: self._group.world_size]
        size = 2 * self._config.micro_batch_size
        local: list[npt.NDArray[np.float32]] = []  # [L] of each text, or [T, L]
        begin = 0
        while begin < len(mine):
            longest = len(self._validation.input_ids[mine[min(begin + size, len(mine)) - 1]])
            end = begin + rows_of_length(size, longest)
            texts = [self._validation.input_ids[i] for i in mine[begin:end]]
            begin = end
            logits = self.model(*self._to_device(*pad(texts, self._tokenizer.pad_id)))
            rows = logits.float().cpu().numpy()
            if self.task.is_per_token:  # without padding
                local += [row[: len(ids)] for row, ids in zip(rows, texts, strict=True)]
            else:
                local += list(rows)
        gathered: dict[int, npt.NDArray[np.float32]] = {}
        for rows, values in self._group.gather((mine, local)):
            gathered.update(zip(rows.tolist(), values, strict=True))
        rows_of_logits = [gathered[row] for row in range(len(by_length))]
        given = rows_of_logits if self.task.is_per_token else np.stack(rows_of_logits)  # [rows, L]
        outputs, targets = self.task.to_unit(given), self._validation.labels
        fitted = self.task.fit(outputs, targets)
        metrics = fitted.validate(outputs, targets)
        name = self._config.metric or self.task.default_metric
        score = self._score(metrics, name, len(outputs))
        kept = {key: fitted.fitted[key] for key in self.task.fitted_keys}
        return cast(Metrics, {"score": score, "metric": name, **metrics, **kept})

    def _score(self, metrics: Mapping[str, Any], name: str, rows: int) -> float:
        """The metric that selects a model, higher is better; the loss breaks ties.

        A tie's weight is below that of one text in a share of texts. NaN where there was nothing to
        measure, which is never the best.
        """
        value = float(metrics[name])
        if not self.task.selection_metrics[name]:
            return -value
        return value - 1e-3 * min(float(metrics["loss"]), 10.0) / rows
