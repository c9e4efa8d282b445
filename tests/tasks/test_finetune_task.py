"""A task on labelled texts: batches, loss, learning rates by layer, evaluation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import (
    Attempt,
    finetune_job,
    reviews,
)

from raybert.data.preprocess import pad
from raybert.storage.folder import Folder
from raybert.tasks.tokenized_texts import TextBatch, TokenizedTexts
from raybert.train.distributed import Group
from raybert.train.task import LoaderConfig


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def task_of(job, rank=0, world_size=1):
    return job.make_task(Group(rank, world_size), LoaderConfig())


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_reads_every_text_once_with_any_number_of_ranks(folder, world_size):
    job = finetune_job(folder, rows=reviews(77))
    rows = []
    for rank in range(world_size):
        task = task_of(job, rank, world_size)
        stream = task.batches(0, None)
        for _ in range(task.steps_per_epoch):
            rows += [row for batch in next(stream) for row in batch.row_ids.tolist()]
    assert sorted(rows) == list(range(job.prepared.train.rows))


def test_layer_decay_lowers_the_learning_rate_of_lower_layers(folder):
    task = task_of(finetune_job(folder, model={"num_layers": 2}, layer_decay=0.5))
    names = [name for name, _ in task.model.named_parameters()]
    scales = {name: task.lr_scale(name) for name in names}
    assert {s for n, s in scales.items() if n.startswith("encoder.embeddings")} == {0.125}
    assert {s for n, s in scales.items() if n.startswith("encoder.layers.0.")} == {0.25}
    assert {s for n, s in scales.items() if n.startswith("encoder.layers.1.")} == {0.5}
    assert {s for n, s in scales.items() if not n.startswith("encoder.")} == {1.0}
    attempt = Attempt(finetune_job(folder, layer_decay=0.5), folder / "run")
    groups = attempt.loop.state.optimizer.param_groups
    assert {group["scale"] for group in groups} == {0.25, 0.5, 1.0}


def test_the_loss_applies_class_weights_and_is_zero_for_an_empty_batch(folder):
    rows = [row for row in reviews(120) if row[1] == "pos" or len(row[0]) % 3]
    plain = task_of(finetune_job(folder, rows=rows))
    [batch, *_] = next(plain.batches(0, None))
    with torch.inference_mode():
        mask = batch.attention_mask
        ids = torch.from_numpy(batch.input_ids)
        logits = plain.model.eval()(ids, None if mask is None else torch.from_numpy(mask))
        log = logits.float().log_softmax(-1)
        each = -log[torch.arange(len(log)), torch.from_numpy(batch.labels)]
        assert float(plain.loss(plain.model, batch)) == pytest.approx(float(each.sum()), rel=1e-4)
        assert float(plain.loss(plain.model, plain.empty_batch())) == 0
        weighted = task_of(finetune_job(folder, rows=rows, class_weights=[2.0, 0.5]))
        weighted.model.load_state_dict(plain.model.state_dict())
        weights = torch.tensor([2.0, 0.5])[torch.from_numpy(batch.labels)]
        loss = float(weighted.loss(weighted.model.eval(), batch))
        assert loss == pytest.approx(float((each * weights).sum()), rel=1e-4)
    counts = np.bincount(balanced_labels(folder, rows))
    weights = (counts.sum() / (2 * counts)).tolist()
    losses = []
    for class_weights in ("balanced", weights):
        task = task_of(finetune_job(folder, rows=rows, class_weights=class_weights))
        task.model.load_state_dict(plain.model.state_dict())
        losses.append(float(task.loss(task.model.eval(), batch).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def balanced_labels(folder, rows):
    job = finetune_job(folder, rows=rows)
    return TokenizedTexts.load(job.data, job.prepared.train).labels


def test_evaluation_does_not_depend_on_the_batch_size(folder):
    found = []
    for micro in (1, 4):
        task = task_of(finetune_job(folder, micro_batch_size=micro, validation_fraction=0.3))
        with torch.inference_mode():
            task.model.eval()
            found.append(task.evaluate())
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-5)


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    rows=st.integers(1, 16),
)
def test_long_texts_go_through_the_model_in_smaller_batches(lengths, rows):
    ids, mask = pad([np.ones(length, np.int64) for length in lengths], 0)
    numbers = np.arange(len(lengths))
    batch = TextBatch(0, 0, numbers, ids, mask, numbers)
    parts = batch.split(rows)
    assert [row for part in parts for row in part.row_ids] == list(numbers)
    for part in parts:
        assert len(part.row_ids) <= rows
        assert len(part.row_ids) == 1 or part.input_ids.size <= rows * 512
    if max(lengths) <= 512 and len(lengths) <= rows:
        assert parts == [batch]
