"""Labelled texts: reading, splitting, tokenizing once, saving."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import (
    finetune_job,
    reviews,
)

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.storage.folder import Folder
from raybert.tasks.prepared_texts import prepare_texts
from raybert.tasks.settings import DistillConfig
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.train.distributed import Group
from raybert.train.task import LoaderConfig


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def task_of(job, rank=0, world_size=1):
    return job.make_task(Group(rank, world_size), LoaderConfig())


def test_saved_texts_are_read_back_and_a_damaged_file_is_rejected(folder):
    texts = TokenizedTexts(
        [np.array([3, 70_000], np.uint32), np.array([1], np.uint32)], np.array([1, 0])
    )
    file = texts.save(folder, "t.parquet")
    found = TokenizedTexts.load(folder, file)
    assert [ids.tolist() for ids in found.input_ids] == [[3, 70_000], [1]]
    assert found.labels.tolist() == [1, 0]
    folder.write_bytes("t.parquet", folder.read_bytes("t.parquet")[:-1])
    with pytest.raises(DamagedError, match=f"t.parquet is damaged; delete {folder} and run"):
        TokenizedTexts.load(folder, file)


def test_pickling_and_saving_preserve_texts_labels_and_teacher(folder):
    texts = TokenizedTexts(
        [np.array([3, 70_000], np.uint32), np.array([1], np.uint32)],
        np.array([1, -1]),
        np.array([[0.5, -1.0], [2.0, 0.0]], np.float32),
    )
    file = texts.save(folder, "t.parquet")
    for found in (pickle.loads(pickle.dumps(texts)), TokenizedTexts.load(folder, file)):
        assert [ids.tolist() for ids in found.input_ids] == [[3, 70_000], [1]]
        assert found.labels.tolist() == [1, -1]
        assert found.teacher.tolist() == texts.teacher.tolist()
    assert pickle.loads(pickle.dumps(TokenizedTexts([], np.empty(0, np.int64)))).input_ids == []


def test_shortening_whole_texts_equals_preparing_short_ones(folder):
    rows = [(f"{text} " * 3, label) for text, label in reviews(60)]
    job = finetune_job(folder, rows=rows)
    tokenizer = Tokenizer.load(job.tokenizer)
    files = {}
    for name, seq_len in (("whole", 1 << 20), ("short", 16)):
        prepared = prepare_texts(job.config, tokenizer, seq_len, 0, folder / name)
        files[name] = (TokenizedTexts.load(folder / name, prepared.train), prepared)
    short, how = files["short"]
    whole = files["whole"][0].shortened(Preprocessing(16, how.head_tokens), tokenizer)
    assert max(files["whole"][0].lengths) > 16
    assert [ids.tolist() for ids in whole.input_ids] == [ids.tolist() for ids in short.input_ids]


def test_texts_are_prepared_again_only_when_their_inputs_change(folder):
    job = finetune_job(folder)
    path = folder.join("data/train.parquet")

    def prepare(seq_len=32, **changes):
        config = job.config.model_copy(update=changes)
        return prepare_texts(config, Tokenizer.load(job.tokenizer), seq_len, config.seed, job.data)

    before = Path(path).stat().st_mtime_ns
    assert prepare(lr=0.5, steps=9) == job.prepared
    assert Path(path).stat().st_mtime_ns == before
    for changed in (prepare(validation_fraction=0.4), prepare(seed=5), prepare(seq_len=8)):
        assert changed.train.sha256 != job.prepared.train.sha256
    assert prepare() == job.prepared
    with open(folder.join("labelled.csv"), "a") as file:
        file.write("one more superb film,pos\n")
    assert prepare().train.rows + prepare().validation.rows == 81


def test_too_few_texts_for_validation_or_training_are_rejected(folder):
    with pytest.raises(DataError, match=r"finetune.validation_fraction=0.1 sets 0 of 4 labelled"):
        finetune_job(folder, rows=reviews(4))
    with pytest.raises(DataError, match="sets 4 of 4 .* and leaves 0 for training; change it"):
        finetune_job(folder, rows=reviews(4), validation_fraction=0.99)


def test_training_and_validation_texts_are_disjoint(folder):
    job = finetune_job(folder, validation_fraction=0.25)
    train, held = (
        TokenizedTexts.load(job.data, f) for f in (job.prepared.train, job.prepared.validation)
    )
    assert (len(train.labels), len(held.labels)) == (60, 20)
    seen = {ids.tobytes() for ids in train.input_ids}
    assert not seen & {ids.tobytes() for ids in held.input_ids}


def test_unlabelled_texts_are_learned_from_the_teacher_alone(folder):
    more = [f"{text} indeed" for text, _ in reviews(20, seed=3)]
    known = [text for text, _ in reviews(80)][:5]  # labelled texts are skipped
    path = folder.join("more.txt")
    folder.write_text("more.txt", "\n".join([*more, *known]) + "\n")
    settings = {"distill": {"teacher": "a", "unlabelled": {"path": path}}}
    calls = []

    def teach(texts, task):
        calls.append((texts.texts.to_pylist(), task.labels))
        return np.tile(np.array([[0.0, 4.0]], np.float32), (len(texts.texts), 1))

    job = finetune_job(folder)
    config = job.config.model_copy(
        update={"distill": DistillConfig.model_validate(settings["distill"])}
    )
    tokenizer = Tokenizer.load(job.tokenizer)
    data = folder / "taught"

    def prepare(identity):
        return prepare_texts(config, tokenizer, 32, 0, data, teach=teach, teacher=identity)

    prepared = prepare("one")
    assert prepare("one") == prepared and len(calls) == 1
    prepare("two")
    assert len(calls) == 2
    texts = TokenizedTexts.load(data, prepared.train)
    assert (texts.labels == -1).sum() == len(more)
    assert prepared.skipped == {"labelled elsewhere": len(known)}
    assert calls[0][0][-len(more) :] == more and calls[0][1] == ["neg", "pos"]
    task = task_of(replace(job, config=config, data=data, prepared=prepared))
    stream = task.batches(0, None)
    batches = [b for _ in range(task.steps_per_epoch) for b in next(stream)]
    assert sum(batch.count for batch in batches) == prepared.train.rows
    assert all(batch.teacher.shape == (len(batch.labels), 2) for batch in batches)
    assert torch.isfinite(task.loss(task.model, batches[0]))


def test_unlabelled_texts_without_a_teacher_are_rejected(folder):
    with pytest.raises(ConfigError, match="need an answer to learn; name a model with finetune"):
        finetune_job(folder, distill={"unlabelled": {"path": "x.txt"}})
