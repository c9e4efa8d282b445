"""Tiny texts, corpora, specs and runs for tests, made in this process."""

import json
import random
import warnings
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from raybert.config import build
from raybert.data.corpus.build import inputs_of
from raybert.data.corpus.corpus_writer import Packer, unigram_loss
from raybert.data.corpus.manifest import FORMAT_VERSION, MANIFEST, Manifest
from raybert.data.corpus.parts import PartWriter
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.encoding import id_dtype
from raybert.data.tokenizer_training import TokenizerConfig, make_tokenizer
from raybert.model.settings import ModelConfig
from raybert.storage.folder import Folder
from raybert.tasks.finetune import FinetuneSpec
from raybert.tasks.labelled import read_labelled
from raybert.tasks.masked_lm import PretrainSpec
from raybert.tasks.prepared_texts import prepare_texts
from raybert.tasks.settings import FinetuneConfig, PretrainConfig
from raybert.tasks.single_label import SingleLabel
from raybert.train.checkpoint import CheckpointStore
from raybert.train.distributed import Group
from raybert.train.loop import Loop
from raybert.train.metrics_log import MetricsLog
from raybert.train.run_folder import begin_attempt
from raybert.train.state import Progress
from raybert.train.task import ControlSignals, LoaderConfig

GOOD = "wonderful brilliant moving superb delightful".split()
BAD = "awful boring dreadful clumsy tedious".split()
NEUTRAL = "the film was a story of two people in some town and it had music".split()

MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 64}


def reviews(count, seed=0):
    """Texts whose label, `neg` or `pos`, two of their words determine: [(text, label)]."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = ("neg", "pos")[index % 2]
        words = draw.choices(NEUTRAL, k=draw.randint(4, 14))
        for word in draw.choices(GOOD if label == "pos" else BAD, k=2):
            words.insert(draw.randrange(len(words) + 1), word)
        rows.append((" ".join(words), label))
    return rows


def tokenizer_of(texts):
    """A tokenizer of whole words with every word of these texts."""
    config = TokenizerConfig(kind="words", vocab_size=512, min_frequency=1)
    return make_tokenizer(config, texts)


def make_corpus(folder, *, texts=None, documents=120, seq_len=16, config=None, tokenizer=None):
    """Write a corpus as `raybert corpus` does, without Ray; returns its manifest.

    With a CorpusConfig as `config` it counts as made by that configuration.
    """
    texts = texts or [text for text, _ in reviews(documents)]
    tokenizer = tokenizer or tokenizer_of(texts)
    tokenizer.save(folder)
    held = max(1, len(texts) // 10)
    splits, counts = {}, {}
    for split, part in (("train", texts[held:]), ("heldout", texts[:held])):
        writer = PartWriter(
            folder,
            split,
            seq_len=seq_len,
            vocab_size=tokenizer.vocab_size,
            rows_per_part=16,
            rows_per_group=4,
        )
        packer = Packer(
            writer, seq_len=seq_len, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size
        )
        ragged = tokenizer.encode(part)
        packer.add(ragged.values, ragged.word_starts, len(part))
        packer.close()
        splits[split], counts[split] = writer.close(), packer.counts
    loss = unigram_loss(counts["train"], counts["heldout"], tokenizer.is_special)
    info = {"unigram_loss": loss}
    if config is not None:
        assert isinstance(config, CorpusConfig)
        info["config"] = config.model_dump(mode="json")
        info["inputs"] = inputs_of(config)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_len=seq_len,
        dtype=id_dtype(tokenizer.vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        splits=splits,
        info=info,
    )
    folder.write_json(MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def pretrain_job(corpus, model=(), **settings):
    """A pretraining job over a corpus: by default 4 steps of 2 micro-batches of 4 rows."""
    values = {
        "steps": 4,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "evaluations": 1,
        "evaluation_rows": 4,
        "examples": [],
        "precision": "fp32",
        "threads": 1,
        "checkpoint_minutes": None,
        "log_every": 1,
        **settings,
    }
    config = build(PretrainConfig, values, "test")
    return PretrainSpec(
        config=config,
        model=build(ModelConfig, {**MODEL, **dict(model)}, "test"),
        corpus=corpus,
        manifest=Manifest.read(corpus),
        source="generated",
        start=Folder(config.initialize_from) if config.initialize_from else None,
    )


def finetune_job(folder, *, rows=None, model=(), **settings):
    """A fine-tuning job from scratch on generated reviews, in one process."""
    rows = rows or reviews(80)
    csv = write_csv(folder, "labelled.csv", rows)
    return finetune_spec(folder, csv, tokenizer_of([text for text, _ in rows]), model, **settings)


def finetune_spec(folder, path, tokenizer, model=(), **settings):
    """A fine-tuning job from scratch on a file: by default 4 steps of 2 micro-batches of 4 rows."""
    tokenizer.save(folder / "tokenizer")
    values = {
        "source": {"path": path},
        "steps": 4,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "evaluations": 1,
        "precision": "fp32",
        "threads": 1,
        "checkpoint_minutes": None,
        "initialize_from": "scratch",
        "log_every": 1,
        **settings,
    }
    config = build(FinetuneConfig, values, "test")
    data = folder / "data"
    return FinetuneSpec(
        config=config,
        model=build(ModelConfig, {**MODEL, **dict(model)}, "test"),
        start=None,
        tokenizer=folder / "tokenizer",
        data=data,
        prepared=prepare_texts(config, tokenizer, 32, config.seed, data),
    )


def labelled(config, names=None, split=None):
    """Labelled documents of a single-label source, with the numbers of their labels and `names`."""
    if split is not None:
        config = config.model_copy(update={"split": split})
    found = read_labelled(config, SingleLabel, names)
    names = names or SingleLabel.find_labels(found.labels.unique().to_pylist(), config)
    targets = SingleLabel(names).targets(found.labels.to_pylist())
    return SimpleNamespace(
        texts=found.texts, labels=targets, names=names, skipped=found.skipped, take=found.take
    )


def write_csv(folder, name, rows, header="text,label"):
    """Write (text, label) rows; returns the path, or the URI."""
    lines = [header, *(f'"{text}",{label}' for text, label in rows)]
    folder.write_text(name, "\n".join(lines) + "\n")
    return (folder / name).uri


class Scripted:
    """A task that does what another does, but for what a test changes of it.

    `batches` replaces the batches of each step; `factor` gives what the loss of a step's
    micro-batch is multiplied by.
    """

    def __init__(self, task, *, batches=None, factor=lambda batch: 1.0):
        self._task, self._batches, self._factor = task, batches, factor

    def __getattr__(self, name):
        return getattr(self._task, name)

    def batches(self, first_step, total_steps):
        if self._batches is None:
            yield from self._task.batches(first_step, total_steps)
        else:
            yield from self._batches[first_step:]
            raise AssertionError("more steps were asked for than the test has")

    def loss(self, module, batch):
        return self._task.loss(module, batch) * self._factor(batch)


class Attempt:
    """One attempt at a run in this process; its logged records are in `records`."""

    def __init__(self, job, run, *, group=None, stop_at=None, task=None, change=None, **options):
        torch.set_num_threads(1)
        group = group or Group()
        task = task or job.make_task(group, LoaderConfig())
        self.task = task if change is None else change(task)
        self.records = []
        number = begin_attempt(run) if group.rank == 0 else 0
        number = int(group.sum([number])[0])
        self.store = CheckpointStore(run, number, job.config.keep_checkpoints)
        self.loop = Loop(
            self.task,
            job.config,
            group,
            self.store,
            on_record=self.records.append,
            signals=ControlSignals(stop=lambda: self.loop.progress.step == stop_at),
            **options,
        )

    def run(self):
        evaluations = self.loop.evaluations()
        while True:
            try:
                next(evaluations)
            except StopIteration as end:
                return end.value

    def of_kind(self, kind):
        return [record for record in self.records if record["kind"] == kind]

    def events(self):
        return {record["event"]: record["message"] for record in self.of_kind("event")}


def metrics_log(run, attempt, first_step, on_record=lambda record: None):
    """The log of an attempt that starts at a step."""
    log = MetricsLog(Progress(step=first_step), on_record)
    log.open(run, attempt)
    return log


@contextmanager
def gradients_of(loop, max_norm=None):
    """Collect each step's gradients by parameter name, as the optimizer gets them."""
    steps = []

    def note(optimizer, args, kwargs):
        named = loop.task.model.named_parameters()
        steps.append({k: p.grad.detach().clone() for k, p in named if p.grad is not None})

    handle = loop.state.optimizer.register_step_pre_hook(note)
    try:
        yield steps
    finally:
        handle.remove()


def cut_batch(batch, pieces):
    """Cut a micro-batch of pretraining into micro-batches of the same rows."""
    at = np.array_split(np.arange(len(batch.row_ids)), pieces)
    return [
        replace(
            batch,
            micro_batch_index=index,
            row_ids=batch.row_ids[rows],
            input_ids=batch.input_ids[rows],
            labels=batch.labels[rows],
        )
        for index, rows in enumerate(at)
    ]


def committed(run, step):
    """The folder that a checkpoint's commit names."""
    checkpoints = Path((run / "checkpoints").path)
    commit = max(checkpoints.glob(f"step-{step:08d}-a*.json"))
    return checkpoints / json.loads(commit.read_text())["folder"]


def damage(path, how):
    """Flip a bit of a file, cut it in half, or delete it (`gone`)."""
    data = path.read_bytes()
    if how == "bit":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


@contextmanager
def gloo_group(rank, rendezvous, world_size, timeout_s):
    """Be one of `world_size` processes on one thread each; `rendezvous` is a file of the group."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    yield Group.current(torch.device("cpu"))
    if world_size > 1:
        dist.destroy_process_group()


def same_tensors(one, other):
    """Whether two dictionaries of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def folder(path):
    """A Folder of a path."""
    return Folder(path)


def searchable(path, *, count=160, made=None, finetune=(), tune=(), **sections):
    """An experiment that can be searched at once: from scratch, on generated texts.

    They are reviews, or with `made` those of that task in `made.TASKS`.
    """
    from made import TASKS as MADE
    from made import texts_of

    from raybert.experiment import Experiment

    here = Folder(path)
    if made is None:
        texts = write_csv(here, "labelled.csv", reviews(count))
        test = write_csv(here, "test.csv", reviews(60, seed=1))
        words = [text for text, _ in reviews(count)]
    else:
        rows = MADE[made](count).rows
        words = [text for row in rows for text in texts_of(row)]
        parts = {"labelled.jsonl": rows, "test.jsonl": MADE[made](60, seed=1).rows}
        for name, part in parts.items():
            here.write_text(name, "".join(json.dumps(row) + "\n" for row in part))
        texts, test = ((here / name).uri for name in parts)
    values = {
        "run": {"name": "tiny", "storage": str(path / "runs")},
        "corpus": {"source": {"path": texts}, "seq_len": 32},
        "model": MODEL,
        "finetune": {
            "source": {"path": texts},
            "initialize_from": "scratch",
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "steps": 12,
            "evaluations": 3,
            "lr": 1e-2,
            "threads": 1,
            "precision": "fp32",
            "log_every": 1,
            **dict(finetune),
        },
        "tune": {
            "trials": 4,
            "searcher": "random",
            "scheduler": {"kind": "none"},
            "finalists": 1,
            "seeds": 1,
            "space": {"finetune.lr": {"log_uniform": [1e-3, 3e-2]}},
            **dict(tune),
        },
        "evaluate": {"source": {"path": test}},
        **sections,
    }
    experiment = build(Experiment, values, "test")
    tokenizer_of(words).save(experiment.folder / "corpus")
    return experiment
