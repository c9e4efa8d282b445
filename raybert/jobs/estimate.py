"""Estimate parameters, storage, steps and time of a run before it is submitted.

The estimate uses the corpus' manifest, the run's metrics and the resources of the cluster; nothing
is measured. An unreachable storage is tried once: each attempt takes Arrow's full timeout.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from raybert.cluster.session import gpu_type
from raybert.data.corpus.manifest import Manifest
from raybert.data.order import CorpusOrder
from raybert.errors import RaybertError
from raybert.experiment import Experiment
from raybert.model import huggingface
from raybert.model.cost import flops_per_token, num_parameters
from raybert.model.encoder import Encoder
from raybert.model.heads import Classifier, MaskedLM
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.storage.registry import find_model
from raybert.tasks.prepared_texts import read_prepared_texts
from raybert.tasks.settings import FinetuneConfig, PretrainConfig
from raybert.terminal.formats import format_count, format_duration, size
from raybert.train.metrics_log import read_metrics
from raybert.train.ray.placement import uses_gpus
from raybert.train.run_folder import RESULT
from raybert.train.settings import TrainConfig
from raybert.train.throughput import gpu_peak_flops

#: The commands that train, and the stages of each.
TRAINING_STAGES = {
    "pretrain": ("pretrain",),
    "finetune": ("finetune",),
    "run": ("pretrain", "finetune"),
    "tune": ("tune",),
}
#: Assumed share of a GPU's peak. NVIDIA's BERT-large reaches 43% on an A100; small encoders less.
GPU_SHARE = 0.3
#: Assumed operations per second and core. On cores with bf16 in hardware 127e9 were measured
#: (benchmarks/results/peers-small-20261125.json); without, it is a third of that.
CORE_FLOPS = 50e9

_COPIES = 3  # fp32 copies of the weights in a checkpoint: weights and AdamW's two moments
_TENSOR_BYTES = 450  # metadata of a tensor and its moments: names, shapes, step
_RECENT = 20  # logged intervals whose median is the measured speed

T = TypeVar("T")


class StorageEstimate(NamedTuple):
    """Storage of a run."""

    parameters: int
    tensors: int
    checkpoints: int  # at most at once: the kept ones, the best one, and the one being written

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return 4 * _COPIES * self.parameters + _TENSOR_BYTES * self.tensors

    @property
    def model(self) -> int:
        """Bytes of the finished model's weights."""
        return 4 * self.parameters

    @property
    def total(self) -> int:
        """Bytes in all, at most."""
        return self.checkpoints * self.checkpoint + self.model


class MeasuredSpeed(NamedTuple):
    """Progress and speed of a run that has begun."""

    step: int
    seconds: float  # of training so far
    step_seconds: float
    workers: int | None  # None where its log does not say


class Estimate(NamedTuple):
    """The remaining work of a run; unknown figures are None."""

    size: StorageEstimate | None
    steps: int | None
    tokens: float | None  # an upper bound: texts may be shorter than a row
    flops: float | None
    seconds: float | None
    gpu: bool | None  # whether each worker has one
    workers: int
    basis: str  # the measurement or assumption behind the time, or why it is unknown


def training_of(experiment: Experiment, stage: str) -> PretrainConfig | FinetuneConfig:
    """Return the training settings of a stage; trials of a search are fine-tuning runs."""
    return experiment.pretrain if stage == "pretrain" else experiment.finetune


def estimate(
    experiment: Experiment, stage: str, resources: Mapping[str, float], *, reads: bool = True
) -> Estimate:
    """Estimate the remaining work of pretrain, finetune or tune.

    `resources` are the cluster's, by Ray's names; empty: unknown. `reads`: storages may be read.
    """
    config = training_of(experiment, stage)
    shape = shape_of(experiment, stage, reads=reads)
    measured = read_or_none(lambda: measured_speed(experiment.folder / stage), reads)
    done = measured.step if measured else 0
    epoch = read_or_none(lambda: _epoch(experiment, stage), reads)
    seq_len = seq_len_of(experiment, stage)
    steps = _steps(config, epoch, seq_len)
    left = None if steps is None else max(0, steps - done)
    step_tokens = config.global_batch_size * seq_len if epoch is None else epoch[1] / epoch[0]
    tokens = None if left is None else left * step_tokens
    flops = None
    if tokens is not None and shape is not None:
        head = (shape[1], config.masking.mask_rate) if isinstance(config, PretrainConfig) else ()
        flops = tokens * flops_per_token(shape[0], seq_len, *head)
    gpu: bool | None = {"yes": True, "no": False, "auto": None}[config.gpu]
    if resources:
        gpu = uses_gpus(config, resources.get("GPU", 0))
    seconds, basis = _time(config, left, flops, measured, gpu, resources)
    return Estimate(
        size=estimate_storage(experiment, stage, shape),
        steps=left,
        tokens=tokens,
        flops=flops,
        seconds=seconds,
        gpu=gpu,
        workers=config.max_workers,
        basis=basis,
    )


def shape_of(
    experiment: Experiment, stage: str, *, reads: bool = True
) -> tuple[ModelConfig, int] | None:
    """Return a stage's encoder settings and vocabulary size (at most); None where unknown."""
    start = training_of(experiment, stage).initialize_from
    if start in (None, "scratch"):
        manifest = read_or_none(lambda: Manifest.read(experiment.folder / "corpus"), reads)
        tokenizer = experiment.corpus.tokenizer
        if manifest is None and tokenizer.kind == "file":
            return None
        return experiment.model, manifest.vocab_size if manifest else tokenizer.vocab_size
    is_own = start == "pretrain"
    folder = read_or_none(
        lambda: find_model(experiment.folder / start if is_own else Folder(start), "pretrain"),
        reads,
    )
    if folder is not None:
        return read_or_none(lambda: huggingface.read_model_config(folder))
    return shape_of(experiment, "pretrain", reads=reads) if is_own else None


def estimate_storage(
    experiment: Experiment, stage: str, shape: tuple[ModelConfig, int] | None
) -> StorageEstimate | None:
    """Estimate the storage of a stage's run from its encoder; None where that is unknown."""
    if shape is None:
        return None
    model, vocab_size = shape
    with torch.device("meta"):  # parameters without memory
        encoder = Encoder(model, vocab_size)
        module: nn.Module = MaskedLM(encoder)
        if stage != "pretrain":
            module = Classifier(encoder, num_labels=2, config=experiment.finetune.head)
    return StorageEstimate(
        parameters=num_parameters(module),
        tensors=len(list(module.parameters())),
        checkpoints=training_of(experiment, stage).keep_checkpoints + 2,
    )


def measured_speed(run: Folder) -> MeasuredSpeed | None:
    """Read the latest speed of a run from its metrics; None where there are none."""
    records = read_metrics(run)
    trained = [record for record in records if record["kind"] == "train"]
    if not trained:
        return None
    workers = [record["workers"] for record in records if "workers" in record]  # of each attempt
    return MeasuredSpeed(
        step=trained[-1]["step"],
        seconds=trained[-1]["seconds"],
        step_seconds=statistics.median(record["step_seconds"] for record in trained[-_RECENT:]),
        workers=workers[-1] if workers else None,
    )


def read_or_none(read: Callable[[], T], reads: bool = True) -> T | None:
    """Call `read`; None where the file is missing or unreadable, or nothing may be read."""
    try:
        return read() if reads else None
    except (RaybertError, FileNotFoundError):
        return None


def seq_len_of(experiment: Experiment, stage: str) -> int:
    """Return the maximum tokens of a row."""
    if stage == "pretrain":
        return experiment.corpus.seq_len
    return experiment.finetune.seq_len or experiment.model.max_seq_len


def _epoch(experiment: Experiment, stage: str) -> tuple[int, int] | None:
    """Return steps and tokens (at most) of an epoch; None before the data are prepared."""
    config = training_of(experiment, stage)
    if stage != "pretrain":
        prepared = read_prepared_texts(experiment.folder / stage / "data")
        if prepared is None:
            return None
        rows = prepared.train.rows
        seq_len = min(prepared.seq_len, seq_len_of(experiment, stage))
        return max(1, math.ceil(rows / config.global_batch_size)), rows * seq_len
    manifest = Manifest.read(experiment.folder / "corpus")
    train = manifest.splits["train"]
    order = CorpusOrder(
        rows=train.rows,
        rows_per_group=train.rows_per_group,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
    )
    return order.steps_per_epoch, train.rows * manifest.seq_len


def _steps(config: TrainConfig, epoch: tuple[int, int] | None, seq_len: int) -> int | None:
    """Return the steps of the run; None where a time or an epoch of unknown length limits it."""
    if epoch is not None:
        return config.limit_in_steps(*epoch)
    if config.tokens is not None:
        return math.ceil(config.tokens / (config.global_batch_size * seq_len))
    return config.steps


def _time(
    config: TrainConfig,
    left: int | None,
    flops: float | None,
    measured: MeasuredSpeed | None,
    gpu: bool | None,
    resources: Mapping[str, float],
) -> tuple[float | None, str]:
    """Return seconds of training and their basis, or None and why they are unknown."""
    workers = config.max_workers
    if config.minutes is not None:
        spent = measured.seconds if measured else 0.0
        return max(0.0, config.minutes * 60 - spent), f"{config.section}.minutes={config.minutes:g}"
    if left is None:
        return None, "the data are not prepared yet, so an epoch's steps are not known"
    if measured is not None:
        count = measured.workers or workers
        on = f" on {count} worker{'s' if count > 1 else ''}" if measured.workers else ""
        seconds = left * measured.step_seconds * count / workers
        return seconds, f"measured by an earlier attempt{on}"
    if flops is None:
        return None, "this machine cannot read the model"
    if gpu is None or not resources:
        return None, "the cluster's resources are unknown"
    if gpu:
        kind = gpu_type(resources)
        peak = gpu_peak_flops(kind)
        if not peak:
            return None, f"the peak of GPUs of type {kind or 'unknown'} is unknown"
        basis = f"assumed {GPU_SHARE:.0%} of the {peak / 1e12:.0f} TFLOP/s of an {kind}"
        return flops / (workers * peak * GPU_SHARE), basis
    cores = workers * (config.threads or max(1, int(resources.get("CPU", 0)) // workers))
    on = "a core" if cores == 1 else f"each of {cores} cores"
    return flops / (cores * CORE_FLOPS), f"assumed {CORE_FLOPS / 1e9:.0f} GFLOP/s on {on}"


def estimate_lines(
    experiment: Experiment, command: str, resources: Mapping[str, float]
) -> list[str]:
    """Estimate the stages that a command trains, as lines; none where it trains nothing."""
    stages = TRAINING_STAGES.get(command, ())
    lines, can_read = [], True
    if stages:
        try:
            experiment.folder.exists()
        except RaybertError as error:
            lines, can_read = [f"{experiment.run.storage} cannot be read here: {error}"], False
    for stage in stages:
        if can_read and _is_finished(experiment, stage):
            lines.append(f"{stage}: finished already")
            continue
        if stage == "tune":
            lines.append(f"tune: {_format_search(experiment)}; each of them as configured:")
        estimated = estimate(experiment, stage, resources, reads=can_read)
        lines += [f"{stage}: {line}" for line in format_estimate(estimated)]
    return lines


def format_estimate(estimated: Estimate) -> list[str]:
    """Format two lines: storage, and computation."""
    stored = "parameters and checkpoints unknown"
    sizes = estimated.size
    if sizes is not None:
        stored = (
            f"{format_count(sizes.parameters)} parameters; at most {sizes.checkpoints} "
            f"checkpoints of {size(sizes.checkpoint)} and a model of {size(sizes.model)}, "
            f"{size(sizes.total)} in all"
        )
    work = []
    if estimated.steps is not None:
        work.append(f"{estimated.steps:,} steps")
    if estimated.tokens is not None:
        work.append(f"up to {format_count(estimated.tokens)} tokens")
    if estimated.flops is not None:
        work.append(f"{estimated.flops:.1e} FLOP")
    time = f"time unknown: {estimated.basis}"
    if estimated.seconds is not None:
        devices = "worker" if estimated.gpu is not True else "GPU"
        seconds = estimated.seconds
        rounded = seconds if seconds < 120 else 60 * round(seconds / 60)
        time = f"about {format_duration(rounded)} on {estimated.workers} {devices}"
        time += "s" if estimated.workers > 1 else ""
        if estimated.gpu:
            time += f" = {estimated.workers * seconds / 3600:.1f} GPU-hours"
        time += f" ({estimated.basis})"
    return [stored, ", ".join([*work, time])]


def _format_search(experiment: Experiment) -> str:
    """Format the number of fine-tuning runs of a search."""
    config = experiment.tune
    finals = (config.finalists + 1) * config.seeds
    minutes = f" in {config.minutes:g} minutes" if config.minutes is not None else ""
    trials = "a grid of trials" if config.searcher == "grid" else f"{config.trials} trials"
    return f"{trials}{minutes}, then up to {finals} runs of the finalists"


def _is_finished(experiment: Experiment, stage: str) -> bool:
    return bool(read_or_none(lambda: (experiment.folder / stage).exists(RESULT)))
