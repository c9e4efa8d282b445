"""Masked language modelling: batches, loss, evaluation, checks and the written model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from making import make_corpus, pretrain_job, same_tensors

from raybert.data.masking import IGNORE_INDEX
from raybert.data.tokenizer import Tokenizer
from raybert.errors import ConfigError, DamagedError, DataError
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks import masked_lm
from raybert.tasks.mask_predictions import predict_masks
from raybert.train.distributed import Group
from raybert.train.run import train_in_process
from raybert.train.task import LoaderConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("pretrain")) / "corpus"
    make_corpus(folder)
    return folder


def task_of(job, rank=0, world_size=1):
    return job.make_task(Group(rank, world_size), LoaderConfig())


def take(task, first, count, total=100):
    stream = task.batches(first, total)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_the_same_steps(corpus, world_size):
    job = pretrain_job(corpus, micro_batch_size=2)
    expected = take(task_of(job), 3, 9)
    ranks = [take(task_of(job, rank, world_size), 3, 9) for rank in range(world_size)]
    for step, whole in enumerate(expected):
        parts = [batch for rank in ranks for batch in rank[step]]
        assert [b.digest() for b in parts] == [b.digest() for b in whole]


def test_an_epoch_reads_every_row_once_in_an_order_of_its_own(corpus):
    job = pretrain_job(corpus)
    task = task_of(job)
    rows = job.manifest.splits["train"].rows
    epochs = []
    for epoch in range(2):
        steps = take(task, epoch * task.steps_per_epoch, task.steps_per_epoch)
        ids = np.concatenate([batch.row_ids for step in steps for batch in step])
        assert sorted(ids.tolist()) == list(range(rows))
        epochs.append(ids.tolist())
    assert epochs[0] != epochs[1]


def test_an_empty_batch_has_zero_loss_and_zero_gradients(corpus):
    task = task_of(pretrain_job(corpus))
    batch = task.empty_batch()
    assert batch.count == 0
    loss = task.loss(task.model, batch)
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(not p.grad.any() for p in task.model.parameters() if p.grad is not None)


def test_the_loss_is_the_sum_over_masked_positions(corpus):
    task = task_of(pretrain_job(corpus))
    [[batch, _]] = take(task, 0, 1)
    ids = torch.from_numpy(batch.input_ids.astype(np.int64))
    labels = torch.from_numpy(batch.labels.astype(np.int64)).ravel()
    where = (labels != IGNORE_INDEX).nonzero()[:, 0]
    with torch.inference_mode():
        logits = task.model.logits(ids, None, where)
        expected = torch.nn.functional.cross_entropy(logits, labels[where], reduction="sum")
        assert float(task.loss(task.model, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_the_held_out_loss_depends_neither_on_batch_size_nor_on_mask_rate(corpus):
    losses = []
    for micro, rate in ((1, 0.15), (4, 0.5), (8, 0.3)):
        job = pretrain_job(
            corpus, micro_batch_size=micro, evaluation_rows=100, masking={"mask_rate": rate}
        )
        task = task_of(job)
        with torch.inference_mode():
            losses.append(task.evaluate()["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    assert losses[0] == pytest.approx(math.log(job.manifest.vocab_size), rel=0.1)  # untrained


def test_training_starts_from_a_given_model(corpus, tmp_path):
    first = pretrain_job(corpus, steps=2)
    result = train_in_process(first, Folder(tmp_path / "a"), on_progress=lambda record: None)
    task = task_of(pretrain_job(corpus, initialize_from=result["model"]))
    expected = huggingface.load_masked_lm(Folder(result["model"])).state_dict()
    assert same_tensors(task.model.state_dict(), expected)
    assert not same_tensors(task_of(first).model.state_dict(), expected)


def test_separating_packed_documents_changes_the_loss(corpus):
    joined = task_of(pretrain_job(corpus, packed_documents="joined"))
    separate = task_of(pretrain_job(corpus, packed_documents="separate"))
    separate.model.load_state_dict(joined.model.state_dict())
    [[batch, _]] = take(joined, 0, 1)
    cls_id = Tokenizer.load(corpus).cls_id
    assert (batch.input_ids == cls_id).sum(1).max() > 1
    with torch.inference_mode():
        losses = [float(task.loss(task.model, batch)) for task in (joined, separate)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("layout", ["modern", "classic"])
def test_documents_by_their_lengths_are_those_of_a_mask(corpus, monkeypatch, layout):
    task = task_of(pretrain_job(corpus, {"layout": layout, "num_layers": 2}, micro_batch_size=8))
    batches = [batch for step in take(task, 0, 4) for batch in step]
    ids, labels = batches[-1].input_ids.copy(), batches[-1].labels.copy()
    ids[-1, 11:], labels[-1, 11:] = Tokenizer.load(corpus).pad_id, IGNORE_INDEX
    batches.append(replace(batches[-1], input_ids=ids, labels=labels))
    found = []
    for most in (512, 0):  # tokens of rows whose documents are separated by a mask
        monkeypatch.setattr(masked_lm, "MAX_MATMUL_TOKENS", most)
        task.model.zero_grad()
        losses = [task.loss(task.model, batch) for batch in batches]
        torch.stack(losses).sum().backward()
        found.append([*losses, *(p.grad for p in task.model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_valid_run_passes_the_checks(corpus):
    pretrain_job(corpus, examples=["a [MASK]"]).check()


def test_checks_reject_rows_examples_and_parts_that_do_not_fit(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"corpus.seq_len=16 is past model.max_seq_len=8; set"):
        pretrain_job(corpus, {"max_seq_len": 8}).check()
    with pytest.raises(ConfigError, match=r"pretrain.examples\[0\]: 'none' has no \[MASK\]"):
        pretrain_job(corpus, examples=["none"]).check()
    broken = Folder(tmp_path) / "corpus"
    make_corpus(broken)
    part = tmp_path / "corpus" / "heldout-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="heldout-00000.parquet has .* bytes, its manifest says"):
        pretrain_job(broken).check()


def test_checks_reject_a_start_model_that_does_not_fit_the_corpus(corpus, tmp_path):
    start = Folder(train_in_process(
        pretrain_job(corpus, steps=1), Folder(tmp_path / "a"), on_progress=lambda record: None
    )["model"])  # fmt: skip
    assert huggingface.read_model_config(start)[0].hidden_size == 16
    pretrain_job(corpus, initialize_from=start.uri).check()
    other = Folder(tmp_path / "other")
    make_corpus(other, texts=["quite other words stand here"] * 40)
    with pytest.raises(ConfigError, match="has another vocabulary than the corpus; make the corp"):
        pretrain_job(other, initialize_from=start.uri).check()
    make_corpus(other, texts=[" ".join(f"w{n}" for n in range(200))] * 40)
    with pytest.raises(
        ConfigError, match=r"knows \d+ tokens, the corpus has 20\d; make the corpus"
    ):
        pretrain_job(other, initialize_from=start.uri).check()
    with pytest.raises(ConfigError, match="past the 8 tokens that pretrain.initialize_from="):
        pretrain_job(corpus, {"max_seq_len": 8}, initialize_from=start.uri).check()


def test_checks_reject_an_example_longer_than_max_seq_len(corpus):
    text = "film " * 63 + "[MASK]"
    with pytest.raises(ConfigError, match="has 66 tokens, the model reads 64; shorten it"):
        pretrain_job(corpus, examples=[text]).check()


def test_the_model_keeps_line_breaks_and_omits_an_infinite_unigram_loss(corpus, tmp_path):
    """Both come from the manifest, in which an infinite unigram loss is null."""
    job = pretrain_job(corpus, steps=1)
    info = {"unigram_loss": None, "config": {"source": {"html_breaks": "keep"}}}
    job = replace(job, manifest=job.manifest.model_copy(update={"info": info}))
    result = train_in_process(job, Folder(tmp_path), on_progress=lambda record: None)
    assert "unigram_loss" not in result
    assert huggingface.read_preprocessing(Folder(result["model"]))["html_breaks"] == "keep"
    card = Folder(result["model"]).read_text("README.md")
    assert "nats per masked token\n" in card and "nan" not in card


def test_masks_are_predicted_in_the_order_of_the_text(corpus):
    task, tokenizer = task_of(pretrain_job(corpus)), Tokenizer.load(corpus)
    model = task.model.eval()
    both = predict_masks(model, tokenizer, "the [MASK] was [MASK]", top=4)
    assert [len(tokens) for tokens in both] == [4, 4]
    ids = torch.from_numpy(tokenizer.encode_masked("the [MASK] was [MASK]"))
    with torch.inference_mode():
        logits = model.logits(ids[None], None, torch.tensor([4]))
    best = logits.softmax(-1)[0].argmax()
    assert both[1][0]["token"] == tokenizer.hf.id_to_token(int(best))
    with pytest.raises(DataError, match=r"'plain' has no \[MASK\]"):
        predict_masks(model, tokenizer, "plain")
