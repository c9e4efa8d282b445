"""Pretraining: learn to fill in masked tokens of a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from raybert.data.corpus.parts import Manifest, PartReader
from raybert.data.loader import BatchPlan, MicroBatch, ray_micro_batches
from raybert.data.masking import EVALUATION, IGNORE_INDEX, MaskingConfig, Vocabulary, mask_rows
from raybert.data.order import CorpusOrder, assign_to_ranks
from raybert.data.tokenizer import TOKENIZER_FILE, Tokenizer
from raybert.errors import ConfigError, DataError
from raybert.model import huggingface
from raybert.model.cost import flops_per_token
from raybert.model.encoder import Encoder
from raybert.model.heads import MaskedLM
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.train.distributed import Group
from raybert.train.run import LoaderConfig
from raybert.train.settings import TrainConfig
from raybert.train.task import Batch

_THEIR_TOKENIZER = (
    "make the corpus with corpus.tokenizer.kind=file and corpus.tokenizer.path=that folder"
)
EVALUATION_SEED = 15  # evaluation's masks are the same in every run, so that losses compare


class PretrainConfig(TrainConfig):
    """How an encoder is pretrained."""

    section: ClassVar = "pretrain"
    default_epochs: ClassVar = 10

    epochs: float | None = Field(None, gt=0, description="limit in passes over the corpus")
    masking: MaskingConfig = MaskingConfig()
    packed_documents: Literal["separate", "joined"] = Field(
        "separate",
        description="whether documents packed into one row see each other; in equal time, separate "
        "ones end 0.07 nats lower (benchmarks/results/packed-20261125.json)",
    )
    initialize_from: str | None = Field(
        None, description="a model/ folder whose weights training starts from; null: fresh ones"
    )
    evaluation_rows: int = Field(2048, ge=1, description="held-out rows that are evaluated on")
    examples: list[str] = Field(
        ["I have watched this [MASK] and it was awesome."],
        description="sentences whose five likeliest fillings are logged at every evaluation",
    )


@dataclass(frozen=True)
class PretrainSpec:
    """A pretraining run, as it travels to workers."""

    config: PretrainConfig
    model: ModelConfig
    corpus: Folder
    manifest: Manifest
    source: str  # what the model card says of the data
    start: Folder | None = None  # the model whose weights it starts from, and `model` its shape

    def check(self) -> None:
        """Find what would fail later, before any worker starts.

        Raises:
            ConfigError: settings that don't fit each other or the corpus.
            DataError: the corpus lacks rows or its tokenizer is another one.
            DamagedError: a part is missing or cut short.
        """
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
        if self.start is not None:
            self._check_vocabulary(self.start, tokenizer)
        for text in self.config.examples:
            if tokenizer.mask_token not in text:
                raise ConfigError(
                    f"pretrain.examples: {text!r} has no {tokenizer.mask_token}; put one where a "
                    "word is to be guessed"
                )
            length = len(tokenizer.encode_batch([text])[0])
            if length > model.max_seq_len:
                raise ConfigError(
                    f"pretrain.examples: {text[:40]!r}... has {length:,} tokens, the model reads "
                    f"{model.max_seq_len}; shorten it around the {tokenizer.mask_token}"
                )

    def _check_vocabulary(self, start: Folder, tokenizer: Tokenizer) -> None:
        """Raise where the ids of the corpus do not mean to the model what they mean here."""
        known = huggingface.read_model_config(start)[1]
        if self.manifest.vocab_size > known:
            raise ConfigError(
                f"pretrain.initialize_from={start} knows {known:,} tokens, the corpus has "
                f"{self.manifest.vocab_size:,}; {_THEIR_TOKENIZER}"
            )
        if not start.exists(TOKENIZER_FILE):
            return
        if Tokenizer.load(start).hf.get_vocab() != tokenizer.hf.get_vocab():
            raise ConfigError(
                f"pretrain.initialize_from={start} has another vocabulary than the corpus; "
                f"{_THEIR_TOKENIZER}"
            )

    def inputs(self) -> dict[str, str]:
        """The identity of the corpus: its parts follow from what its manifest says."""
        return {"corpus": self.manifest.digest}

    def make_task(self, group: Group, feed: LoaderConfig) -> MaskedLMTask:
        """Build the task on a worker."""
        return MaskedLMTask(self, group, feed)

    def finish(self, task: Any, run: Folder) -> dict[str, Any]:
        """Write `model/` from the weights that are in the task."""
        metrics = {key: task.last[key] for key in ("loss", "unigram_loss") if key in task.last}
        folder = run / "model"
        huggingface.save_masked_lm(
            task.model,
            self.corpus,
            folder,
            card=model_card(self, metrics),
            preprocessing={
                "seq_len": self.manifest.seq_len,
                "html_breaks": self._html_breaks(),
            },
        )
        return {"model": folder.uri}

    def _html_breaks(self) -> str:
        """How the corpus was read; its manifest keeps the configuration that made it."""
        made_with = self.manifest.info.get("config", {})
        return str(made_with.get("source", {}).get("html_breaks", "space"))


class MaskedLMTask:
    """The loop's view of pretraining."""

    def __init__(self, job: PretrainSpec, group: Group, feed: LoaderConfig) -> None:
        self._job, self._group, self._feed = job, group, feed
        config = job.config
        self._tokenizer = Tokenizer.load(job.corpus)
        self._reader = PartReader(job.corpus, job.manifest, "train")
        self._order = CorpusOrder(
            rows=self._reader.rows,
            rows_per_group=self._reader.rows_per_group,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
        )
        self._vocabulary = Vocabulary(self._tokenizer.mask_id, self._tokenizer.is_special)
        torch.manual_seed(config.seed)
        if job.start is not None:
            model = huggingface.load_masked_lm(job.start, job.model.dropout)
        else:
            encoder = Encoder(job.model, self._tokenizer.vocab_size, self._tokenizer.pad_id)
            model = MaskedLM(encoder)
        self._model = model.to(group.device)
        self.last: dict[str, Any] = {}  # the last evaluation

    @property
    def model(self) -> MaskedLM:
        """The encoder with its masked-language-model head."""
        return self._model

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the corpus."""
        return self._order.steps_per_epoch

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over the corpus."""
        return self._reader.rows * self._job.manifest.seq_len

    @property
    def flops_per_token(self) -> float:
        """Operations of forward and backward for a token."""
        return flops_per_token(
            self._job.model,
            self._job.manifest.seq_len,
            self._tokenizer.vocab_size,
            self._job.config.masking.mask_rate,
        )

    @property
    def needs_total(self) -> bool:
        """Whether the mask rate follows the run's length."""
        return self._job.config.masking.mask_rate_end is not None

    def batches(self, first_step: int, total_steps: int | None) -> Iterator[Sequence[Batch]]:
        """Yield this rank's masked micro-batches."""
        order, group = self._order, self._group
        indices = assign_to_ranks(order.micro_batches_per_step, group.world_size)[group.rank]
        plan = BatchPlan(
            self._reader,
            order,
            self._job.config.masking,
            self._vocabulary,
            total_steps or 1 << 62,  # unknown as yet: a falling mask rate has not begun to fall
        )
        while True:
            # One execution serves a run; only runs of over 65,536 steps need another.
            last = min(first_step + (1 << 16), max(total_steps or 1 << 62, first_step + 1))
            steps = range(first_step, last)
            if self._feed.on_ray:
                made = ray_micro_batches(
                    plan, indices, steps, cpus=self._feed.cpus, memory=self._feed.memory
                )
            else:
                made = plan.micro_batches(indices, steps)
            yield from made
            first_step = last

    def empty_batch(self) -> MicroBatch:
        """One row in which nothing is predicted."""
        shape = (1, self._job.manifest.seq_len)
        ids = np.full(shape, self._tokenizer.mask_id, np.int32)
        labels = np.full(shape, IGNORE_INDEX, np.int32)
        return MicroBatch(-1, 0, np.full(1, -1), ids, labels)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Sum the cross-entropy over a micro-batch's predicted tokens."""
        assert isinstance(batch, MicroBatch)
        return self._loss(module, batch.input_ids, batch.labels)[0]

    def _loss(self, module: nn.Module, ids: Any, labels: Any) -> tuple[Tensor, int]:
        device = self._group.device
        input_ids = torch.from_numpy(np.array(ids, np.int64)).to(device, non_blocking=True)
        targets = torch.from_numpy(np.array(labels, np.int64)).to(device, non_blocking=True)
        # Only a corpus's very last row is padded: where there is no padding, attention needs no
        # mask, and is faster without.
        padding = ids == self._tokenizer.pad_id
        mask = torch.from_numpy(~padding).to(device) if padding.any() else None
        documents = None
        if self._job.config.packed_documents == "separate":
            documents = (input_ids == self._tokenizer.cls_id).cumsum(1)
        total, count = module(input_ids, targets, mask, documents)
        return total, count

    def lr_scale(self, name: str) -> float:
        """All parameters learn at the same rate."""
        return 1.0

    def prepare(self, step: int) -> bool:
        """Nothing is frozen."""
        return False

    @cached_property
    def _heldout(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """This rank's held-out rows, masked: inputs and labels [n, T]. They stay resident."""
        reader = PartReader(self._job.corpus, self._job.manifest, "heldout")
        count = min(reader.rows, self._job.config.evaluation_rows)
        # Evenly over the split: its documents stand in the order of the source, by label often.
        at = np.arange(count) * reader.rows // count
        ids = at[self._group.rank :: self._group.world_size]
        return mask_rows(
            reader.read_rows(ids),
            ids,
            np.zeros(len(ids), np.int64),
            np.full(len(ids), EVALUATION.mask_rate),
            config=EVALUATION,
            vocabulary=self._vocabulary,
            seed=EVALUATION_SEED,
        )

    def evaluate(self) -> dict[str, Any]:
        """The loss on held-out rows in nats a predicted token, and the examples' fillings."""
        inputs, labels = self._heldout
        size = 2 * self._job.config.micro_batch_size
        total, count = 0.0, 0.0
        for begin in range(0, len(inputs), size):
            at = slice(begin, begin + size)
            loss, predicted = self._loss(self._model, inputs[at], labels[at])
            total, count = total + float(loss), count + predicted
        total, count = self._group.sum([total, count])
        loss_mean = total / max(1.0, count)
        self.last = {"score": -loss_mean, "loss": round(loss_mean, 5)}
        unigram = self._job.manifest.info.get("unigram_loss")
        if unigram is not None:  # held-out words that training never saw have no such loss
            self.last["unigram_loss"] = round(unigram, 5)
        if self._group.rank == 0:
            self.last["fillings"] = [
                {"text": text, "tokens": predictions(self._model, self._tokenizer, text)[0]}
                for text in self._job.config.examples
            ]
        return self.last


def predictions(
    model: MaskedLM, tokenizer: Tokenizer, text: str, top: int = 5
) -> list[list[dict[str, Any]]]:
    """The likeliest tokens for each mask of a text, in the order of the masks.

    Returns:
        For each mask, `top` of {"token", "probability"}, the likeliest first.

    Raises:
        DataError: the text has no mask, or is longer than the model reads.
    """
    ids, where = mask_positions(model, tokenizer, text)
    device = next(model.parameters()).device
    batch = torch.from_numpy(ids)[None].to(device)
    with torch.inference_mode():
        logits = model.logits(batch, None, torch.from_numpy(where).to(device))
    probabilities, best = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    return [
        [
            {"token": tokenizer.hf.id_to_token(int(i)), "probability": round(float(p), 5)}
            for p, i in zip(row_p, row_i, strict=True)
        ]
        for row_p, row_i in zip(probabilities.tolist(), best.tolist(), strict=True)
    ]


def mask_positions(
    model: MaskedLM, tokenizer: Tokenizer, text: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A text's ids [tokens], and the places of its masks [masks] among them.

    Raises:
        DataError: the text has no mask, or is longer than the model reads.
    """
    ids = tokenizer.encode_batch([text])[0].astype(np.int64)
    where = np.flatnonzero(ids == tokenizer.mask_id).astype(np.int64)
    if not len(where):
        raise DataError(
            f"{text[:60]!r} has no {tokenizer.mask_token}: put one where a word is to be guessed"
        )
    limit = model.encoder.config.max_seq_len
    if len(ids) > limit:
        raise DataError(
            f"the text has {len(ids):,} tokens, the model reads {limit}; shorten it around the "
            f"{tokenizer.mask_token}"
        )
    return ids, where


def model_card(job: PretrainSpec, metrics: dict[str, Any]) -> str:
    """The README.md of a pretrained model."""
    shape = job.model
    loss = f"{metrics['loss']:.4f} nats a masked token" if "loss" in metrics else "not measured"
    if "unigram_loss" in metrics:
        loss += f"\n  (a unigram model: {metrics['unigram_loss']:.4f})"
    start = f"\n- Started from: {job.start}" if job.start is not None else ""
    example = next(iter(job.config.examples), "This is [MASK].")
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [raybert]
---
# A {shape.layout} encoder, pretrained with raybert

{shape.num_layers} layers, {shape.hidden_size} hidden, {shape.num_heads} heads, rows of
{job.manifest.seq_len} tokens, masked language modelling at {job.config.masking.mask_rate:.0%}.

- Text: {job.source} ({job.manifest.splits["train"].rows:,} rows)
- Held-out loss: {loss}{start}

```python
from transformers import pipeline
pipeline("fill-mask", model="path/of/this/folder")("{example}")
```
"""
