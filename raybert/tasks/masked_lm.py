"""Masked language modelling: pretraining on the packed rows of a corpus (arXiv 1810.04805).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raybert.data.corpus.manifest import Manifest
from raybert.data.corpus.parts import PartReader
from raybert.data.loader import BatchPlan, MicroBatch, ray_micro_batches
from raybert.data.masking import (
    EVALUATION,
    IGNORE_INDEX,
    Vocabulary,
    document_lengths,
    mask_rows,
    predicted,
    usual_size,
)
from raybert.data.order import CorpusOrder, assign_to_ranks
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError, DataError
from raybert.model import huggingface
from raybert.model.attention import MAX_MATMUL_TOKENS
from raybert.model.cost import flops_per_token
from raybert.model.encoder import Encoder
from raybert.model.heads import MaskedLM
from raybert.model.new_tokens import add_tokens
from raybert.model.settings import ModelConfig
from raybert.records import Metrics, format_mean
from raybert.storage.folder import Folder
from raybert.tasks.mask_examples import MaskExample, heldout_examples
from raybert.tasks.mask_predictions import encode_masked, predict_masks
from raybert.tasks.model_cards import public_name, public_names
from raybert.tasks.settings import PretrainConfig
from raybert.train.distributed import Group
from raybert.train.task import Batch, LoaderConfig

_USE_ITS_TOKENIZER = (
    "make the corpus with corpus.tokenizer.kind=file and corpus.tokenizer.path=that folder"
)
EVALUATION_SEED = 15  # of the masks in evaluation: the same in every run, so that losses compare


@dataclass(frozen=True)
class PretrainSpec:
    """A pretraining run, picklable: the driver sends it to the workers."""

    config: PretrainConfig
    model: ModelConfig
    corpus: Folder
    manifest: Manifest
    source: str  # the text, for the model card
    start: Folder | None = None  # the model to start from, whose configuration is `model`
    order_micro_batch_size: int | None = None  # of the run's first start; None: the configured one

    def check(self) -> None:
        """Check the settings, the corpus and the model to start from, before any worker starts.

        A ConfigError for settings that don't fit, a DataError for a corpus without rows or with
        another tokenizer, a DamagedError for a part that is missing or cut short.
        """
        self._check_length()
        tokenizer = self._check_corpus()
        if self.start is not None:
            self._check_vocabulary(self.start, tokenizer)
        self._check_examples(tokenizer)

    def _check_length(self) -> None:
        manifest, model = self.manifest, self.model
        if self.start is not None and manifest.seq_len > model.max_seq_len:
            raise ConfigError(
                f"corpus.seq_len={manifest.seq_len} is past the {model.max_seq_len} tokens that "
                f"pretrain.initialize_from={self.start} reads; make a corpus with rows that fit"
            )
        if manifest.seq_len > model.max_seq_len:
            raise ConfigError(
                f"corpus.seq_len={manifest.seq_len} is past model.max_seq_len={model.max_seq_len}; "
                f"set model.max_seq_len={manifest.seq_len} or make a corpus with shorter rows"
            )

    def _check_corpus(self) -> Tokenizer:
        manifest = self.manifest
        for split in ("train", "heldout"):
            if split not in manifest.splits or not manifest.splits[split].rows:
                raise DataError(
                    f"{self.corpus}: the split {split!r} has no rows; make the corpus again from "
                    "more text or with another corpus.heldout_fraction"
                )
            PartReader(self.corpus, manifest, split).check()
        tokenizer = Tokenizer.load(self.corpus)
        if tokenizer.hash != manifest.tokenizer_hash:
            raise DataError(
                f"{self.corpus}: tokenizer.json is not the one that made the corpus; put it back "
                "or make the corpus again"
            )
        return tokenizer

    def _check_examples(self, tokenizer: Tokenizer) -> None:
        for number, text in enumerate(self.config.examples or []):
            try:
                encode_masked(tokenizer, text, self.model.max_seq_len)
            except DataError as error:
                raise ConfigError(f"pretrain.examples[{number}]: {error}") from None

    def _check_vocabulary(self, start: Folder, tokenizer: Tokenizer) -> None:
        """Check that the ids of the corpus denote the same tokens in the model to start from."""
        known = huggingface.read_own_config(start)[1]
        if new_tokens(start, tokenizer) is not None:
            return
        if self.manifest.vocab_size > known:
            raise ConfigError(
                f"pretrain.initialize_from={start} knows {known:,} tokens, the corpus has "
                f"{self.manifest.vocab_size:,}; {_USE_ITS_TOKENIZER}"
            )
        if Tokenizer.exists(start):
            raise ConfigError(
                f"pretrain.initialize_from={start} has another vocabulary than the corpus; "
                f"{_USE_ITS_TOKENIZER}"
            )

    def inputs(self) -> dict[str, str]:
        """Hashes of the corpus, whose manifest contains those of its parts, and of the weights."""
        hashes = {"corpus": self.manifest.digest}
        if self.start is not None:
            hashes["model to start from"] = huggingface.weights_hash(self.start)
        return hashes

    def check_sources(self) -> None:
        """Do nothing: a run reads the corpus, not the text that it was made from."""

    def make_task(self, group: Group, loader: LoaderConfig) -> MaskedLMTask:
        """Build the task on a worker."""
        return MaskedLMTask(self, group, loader)

    def finish(self, task: Any, run: Folder, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write `model/` from the weights in the task."""
        folder, config = run / "model", self.manifest.info.get("config", {})
        html_breaks = str(config.get("source", {}).get("html_breaks", "space"))
        huggingface.save_masked_lm(
            task.model,
            self.corpus,
            folder,
            card=model_card(self, metrics),
            preprocessing={"seq_len": self.manifest.seq_len, "html_breaks": html_breaks},
        )
        return {"model": folder.uri}


def new_tokens(start: Folder, tokenizer: Tokenizer) -> dict[int, list[int]] | None:
    """The tokens that a corpus has beside those of a model, by id: the ids of their pieces.

    None: the model has no tokenizer, or the corpus' is not that one with more words.
    """
    words = tokenizer.words_beyond(Tokenizer.load(start)) if Tokenizer.exists(start) else None
    if words is None:
        return None
    ids = tokenizer.hf.get_vocab()
    return {ids[word]: pieces for word, pieces in words.items()}


class MaskedLMTask:
    """Masked language modelling on a corpus, for the training loop."""

    def __init__(self, spec: PretrainSpec, group: Group, loader: LoaderConfig) -> None:
        self._spec, self._group, self._loader = spec, group, loader
        config = spec.config
        self._tokenizer = Tokenizer.load(spec.corpus)
        self._reader = PartReader(spec.corpus, spec.manifest, "train")
        self._order = CorpusOrder(
            rows=self._reader.rows,
            rows_per_group=self._reader.rows_per_group,
            global_batch_size=config.global_batch_size,
            micro_batch_size=spec.order_micro_batch_size or config.micro_batch_size,
            seed=config.seed,
        )
        self._vocabulary = Vocabulary(self._tokenizer.mask_id, self._tokenizer.is_special)
        torch.manual_seed(config.seed)
        if spec.start is not None:
            model = huggingface.make_masked_lm_on(spec.start, spec.model.dropout)
            if pieces := new_tokens(spec.start, self._tokenizer):
                add_tokens(model, pieces)
        else:
            encoder = Encoder(spec.model, self._tokenizer.vocab_size, self._tokenizer.pad_id)
            model = MaskedLM(encoder)
        self.model = model.to(group.device)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.tokens_per_epoch = self._reader.rows * spec.manifest.seq_len
        self.flops_per_token = flops_per_token(
            spec.model, spec.manifest.seq_len, self._tokenizer.vocab_size, config.masking.mask_rate
        )
        self.needs_total = config.masking.mask_rate_end is not None

    def batches(self, first_step: int, total_steps: int | None) -> Iterator[Sequence[Batch]]:
        """Yield this rank's masked micro-batches."""
        order, group = self._order, self._group
        indices = assign_to_ranks(order.micro_batches_per_step, group.world_size)[group.rank]
        plan = BatchPlan(
            self._reader,
            order,
            self._spec.config.masking,
            self._vocabulary,
            total_steps or 1 << 62,  # not yet known: a decaying mask rate is at its start
        )
        while True:
            # One execution of Ray Data lasts 65,536 steps: most runs are shorter.
            last = min(first_step + (1 << 16), max(total_steps or 1 << 62, first_step + 1))
            steps = range(first_step, last)
            if self._loader.on_ray:
                batches = ray_micro_batches(
                    plan, indices, steps, cpus=self._loader.cpus, memory=self._loader.memory
                )
            else:
                batches = plan.micro_batches(indices, steps)
            yield from batches
            first_step = last

    def empty_batch(self) -> MicroBatch:
        """One row without a predicted token, whose loss and gradients are zero."""
        shape = (1, self._spec.manifest.seq_len)
        ids = np.full(shape, self._tokenizer.mask_id, np.int32)
        labels = np.full(shape, IGNORE_INDEX, np.int32)
        return MicroBatch(-1, 0, np.full(1, -1), ids, labels)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Sum the cross-entropy over a micro-batch's predicted tokens."""
        assert isinstance(batch, MicroBatch)
        config, tokens = self._spec.config, batch.input_ids.size
        if not config.compile and self._group.device.type == "cpu":
            return self._loss(module, batch.input_ids, batch.labels)
        masking = config.masking
        size = usual_size(tokens, max(masking.rate(0.0), masking.rate(1.0)))
        # Layers are compiled for whole micro-batches: the last rows of an epoch run as they are.
        is_whole = len(batch.input_ids) == config.micro_batch_size
        is_whole &= self._separate or not (batch.input_ids == self._tokenizer.pad_id).any()
        is_eager = config.compile and not is_whole
        with torch.compiler.set_stance("force_eager") if is_eager else nullcontext():
            return self._loss(module, batch.input_ids, batch.labels, size)

    def _loss(
        self, module: nn.Module, ids: npt.NDArray[Any], labels: npt.NDArray[Any], size: int = 0
    ) -> Tensor:
        """The summed cross-entropy of integer arrays [B, T]; `size` is that of `predicted`."""
        put = self._to_device
        positions, targets = predicted(labels, size)
        # Only the last row of a corpus is padded; without padding, attention runs without a mask,
        # which is faster.
        padding = ids == self._tokenizer.pad_id
        starts = ids == self._tokenizer.cls_id
        mask = documents = lengths = None
        if self._separate and self._attends_by_lengths(ids.shape[1]):
            lengths = document_lengths(starts, padding)
            ids = ids.reshape(1, -1)
        else:
            mask = put(~padding) if padding.any() else None
            documents = put(starts.cumsum(1)) if self._separate else None
        input_ids = put(ids.astype(np.int64))
        total, _ = module(
            input_ids, put(targets), mask, documents, lengths=lengths, positions=put(positions)
        )
        return cast(Tensor, total)

    @property
    def _separate(self) -> bool:
        return self._spec.config.packed_documents == "separate"

    def _attends_by_lengths(self, seq_len: int) -> bool:
        """Whether attention to each document by itself is faster than with a mask [B, 1, T, T]."""
        if self.model.encoder.has_varlen_kernel(self._group.device):
            return True
        # Compiled layers would be compiled for every list of lengths.
        return seq_len > MAX_MATMUL_TOKENS and not self._spec.config.compile

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        """Copy an array; a GPU is not waited for."""
        tensor = torch.from_numpy(array)
        if self._group.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._group.device, non_blocking=True)

    def lr_scale(self, name: str) -> float:
        """All parameters learn at the same rate."""
        return 1.0

    def prepare(self, step: int) -> bool:
        """Return False: nothing is frozen."""
        return False

    @cached_property
    def _heldout(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """This rank's held-out rows, masked: inputs and labels [rows, T], kept in memory."""
        reader = PartReader(self._spec.corpus, self._spec.manifest, "heldout")
        count = min(reader.rows, self._spec.config.evaluation_rows)
        # Evenly spaced, because documents are in the order of the source: often sorted by label.
        rows = np.arange(count) * reader.rows // count
        ids = rows[self._group.rank :: self._group.world_size]
        return mask_rows(
            reader.read_rows(ids),
            ids,
            0,
            EVALUATION.mask_rate,
            config=EVALUATION,
            vocabulary=self._vocabulary,
            seed=EVALUATION_SEED,
        )

    def evaluate(self) -> Metrics:
        """Compute the held-out loss in nats per predicted token; predict the examples' masks."""
        inputs, labels = self._heldout
        size = 2 * self._spec.config.micro_batch_size
        total, count = 0.0, 0.0
        for begin in range(0, len(inputs), size):
            rows = slice(begin, begin + size)
            total += float(self._loss(self.model, inputs[rows], labels[rows]))
            count += int((labels[rows] != IGNORE_INDEX).sum())
        total, count = self._group.sum([total, count])
        loss_mean = total / count if count else math.nan
        metrics: Metrics = {"score": -loss_mean, "loss": round(loss_mean, 5)}
        unigram = self._spec.manifest.info.get("unigram_loss")
        if unigram is not None:  # null where held-out text has tokens that training text lacks
            metrics["unigram_loss"] = round(unigram, 5)
        if self._group.rank == 0:
            metrics["fillings"] = [
                {
                    "text": text,
                    "tokens": predict_masks(self.model, self._tokenizer, text)[0],
                    **({} if expected is None else {"expected": expected}),
                }
                for text, expected in self._examples
            ]
        return metrics

    @cached_property
    def _examples(self) -> list[MaskExample]:
        """The configured sentences, or some of the held-out text."""
        given = self._spec.config.examples
        if given is not None:
            return [MaskExample(text) for text in given]
        reader = PartReader(self._spec.corpus, self._spec.manifest, "heldout")
        return heldout_examples(reader, self._tokenizer)


def model_card(spec: PretrainSpec, metrics: dict[str, Any]) -> str:
    """The model card of a pretrained model, Markdown."""
    shape = spec.model
    loss = format_mean(metrics.get("loss"))
    loss = "not measured" if loss == "none" else f"{loss} nats per masked token"
    if "unigram_loss" in metrics:
        loss += f"\n  (a unigram model: {metrics['unigram_loss']:.4f})"
    start = f"\n- Started from: {public_name(spec.start.uri)}" if spec.start is not None else ""
    examples = [each["text"] for each in metrics.get("fillings") or []]
    example = next(iter(examples), "This is [MASK].").replace('"', "'")
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [raybert]
---
# A {shape.layout} encoder, pretrained with raybert

{shape.num_layers} layers, {shape.hidden_size} hidden, {shape.num_heads} heads, rows of
{spec.manifest.seq_len} tokens, masked language modelling at {spec.config.masking.mask_rate:.0%}.

- Text: {public_names(spec.source.split(", "))} ({spec.manifest.splits["train"].rows:,} rows)
- Held-out loss: {loss}{start}

```python
from transformers import pipeline
pipeline("fill-mask", model="FOLDER")("{example}")
```
"""
