"""A fine-tuning run: its inputs, its checks, the model that it writes."""

from dataclasses import replace

import numpy as np
import pytest
from making import (
    Attempt,
    finetune_job,
    make_corpus,
    pretrain_job,
    reviews,
    same_tensors,
    write_csv,
)

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.finetune import SharedInputs
from raybert.tasks.tokenized_texts import TokenizedTexts
from raybert.train.distributed import Group
from raybert.train.run import train_in_process
from raybert.train.task import LoaderConfig


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def task_of(job, rank=0, world_size=1):
    return job.make_task(Group(rank, world_size), LoaderConfig())


def test_a_classifier_learns_the_words_that_decide_the_label(folder):
    job = finetune_job(folder, rows=reviews(300), steps=None, epochs=6, lr=1e-2)
    result = train_in_process(job, folder / "run", on_progress=lambda record: None)
    assert result["accuracy"] > 0.9
    model, labels = huggingface.load_classifier(folder / "run" / "model")
    assert labels == ["neg", "pos"]
    assert huggingface.read_preprocessing(folder / "run" / "model")["seq_len"] == 32
    assert huggingface.read_calibration(folder / "run" / "model") == result["temperature"]


@pytest.mark.parametrize(
    ("epochs", "batch", "expected"), [(2, 8, [1, 2]), (3, 8, [1, 2, 3]), (3, 16, [1, 2, 3])]
)
def test_runs_of_any_length_are_evaluated_at_the_same_epochs(folder, epochs, batch, expected):
    """A search's scheduler compares trials at these epochs."""
    job = finetune_job(folder, steps=None, epochs=epochs, global_batch_size=batch, evaluations=None)
    attempt = Attempt(job, folder / "run")
    attempt.run()
    assert [record["epoch"] for record in attempt.of_kind("eval")] == expected


def test_training_starts_from_the_pretrained_encoder(folder):
    texts = [text for text, _ in reviews(80)]
    make_corpus(folder / "corpus", texts=texts)
    result = train_in_process(
        pretrain_job(folder / "corpus", steps=2), folder / "pre", on_progress=lambda record: None
    )
    model = Folder(result["model"])
    job = replace(finetune_job(folder), start=model, tokenizer=model)
    task = task_of(job)
    expected = huggingface.load_masked_lm(model).encoder.state_dict()
    assert same_tensors(task.model.encoder.state_dict(), expected)


def test_shared_inputs_give_the_same_weights_as_reading_them(folder):
    texts = [text for text, _ in reviews(80)]
    make_corpus(folder / "corpus", texts=texts)
    start = train_in_process(
        pretrain_job(folder / "corpus", steps=2), folder / "pre", on_progress=lambda record: None
    )
    model = Folder(start["model"])
    job = replace(finetune_job(folder, steps=3), start=model, tokenizer=model)
    sharing = replace(job, shared=SharedInputs.read(job))
    attempts = [Attempt(j, folder / name) for j, name in ((job, "read"), (sharing, "shared"))]
    for attempt in attempts:
        attempt.run()
    one, two = (attempt.store.load(3).model for attempt in attempts)
    assert same_tensors(one, two)


@pytest.mark.parametrize(("breaks", "equal"), [("space", True), ("keep", False)])
def test_line_breaks_are_preprocessed_alike_in_training_and_serving(folder, breaks, equal):
    rows = [(f"{text}<br />superb", label) for text, label in reviews(40)]
    source = {"path": write_csv(folder, "breaks.csv", rows), "html_breaks": breaks}
    job = finetune_job(folder, rows=rows, source=source)
    tokenizer = Tokenizer.load(job.tokenizer)
    result = train_in_process(job, folder / "run", on_progress=lambda record: None)
    kept = huggingface.read_preprocessing(Folder(result["model"]))
    served = Preprocessing.read(kept, 64).encode(tokenizer, [text for text, _ in rows]).rows
    trained = [
        ids.tobytes()
        for file in (job.prepared.train, job.prepared.validation)
        for ids in TokenizedTexts.load(job.data, file).input_ids
    ]
    assert sorted(ids.astype(np.uint32).tobytes() for ids in served) == sorted(trained)
    spaced = Preprocessing(32, 8, "space").encode(tokenizer, [text for text, _ in rows]).rows
    assert (sorted(i.astype(np.uint32).tobytes() for i in spaced) == sorted(trained)) is equal


def test_class_weights_must_match_the_number_of_labels(folder):
    with pytest.raises(ConfigError, match="has 3 values, the data 2 labels"):
        finetune_job(folder, class_weights=[1.0, 1.0, 1.0]).check()


def test_adversarial_training_of_a_compiled_model_is_rejected(folder):
    with pytest.raises(ConfigError, match=r"adversarial=1 shifts embeddings, which a compiled"):
        finetune_job(folder, compile=True, adversarial=1.0)
