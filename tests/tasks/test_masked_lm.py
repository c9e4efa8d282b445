"""Pretraining as a task: what it reads, checks, evaluates and writes."""

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
from raybert.tasks.masked_lm import predictions
from raybert.train.distributed import Group
from raybert.train.run import LoaderConfig, execute_bare


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


def test_an_epoch_reads_every_row_once_and_the_next_one_otherwise(corpus):
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


def test_an_empty_batch_counts_nothing_and_moves_nothing(corpus):
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


def test_evaluation_sums_over_all_rows_whatever_the_batches(corpus):
    """Neither the micro-batch size nor the training mask rate shows in the held-out loss."""
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
    result = execute_bare(first, Folder(tmp_path / "a"), on_progress=lambda record: None)
    task = task_of(pretrain_job(corpus, initialize_from=result["model"]))
    expected = huggingface.load_masked_lm(Folder(result["model"])).state_dict()
    assert same_tensors(task.model.state_dict(), expected)
    assert not same_tensors(task_of(first).model.state_dict(), expected)


def test_separate_documents_do_not_see_each_other(corpus):
    joined = task_of(pretrain_job(corpus, packed_documents="joined"))
    separate = task_of(pretrain_job(corpus, packed_documents="separate"))
    separate.model.load_state_dict(joined.model.state_dict())
    [[batch, _]] = take(joined, 0, 1)
    cls_id = Tokenizer.load(corpus).cls_id
    assert (batch.input_ids == cls_id).sum(1).max() > 1
    with torch.inference_mode():
        losses = [float(task.loss(task.model, batch)) for task in (joined, separate)]
    assert losses[0] != losses[1]


# Checks before any worker starts -----------------------------------------------------------------


def test_what_fits_passes(corpus):
    pretrain_job(corpus, examples=["a [MASK]"]).check()


def test_what_does_not_fit_is_told_before_training(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"corpus.seq_len=16 is past model.max_seq_len=8; set"):
        pretrain_job(corpus, {"max_seq_len": 8}).check()
    with pytest.raises(ConfigError, match=r"pretrain.examples: 'none' has no \[MASK\]"):
        pretrain_job(corpus, examples=["none"]).check()
    broken = Folder(tmp_path) / "corpus"
    make_corpus(broken)
    part = tmp_path / "corpus" / "heldout-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="heldout-00000.parquet has .* bytes, its manifest says"):
        pretrain_job(broken).check()


def test_a_model_to_start_from_must_fit_the_corpus(corpus, tmp_path):
    start = Folder(execute_bare(
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


def test_an_example_longer_than_the_model_reads_is_told_before_training(corpus):
    text = "film " * 63 + "[MASK]"
    with pytest.raises(ConfigError, match="has 66 tokens, the model reads 64; shorten it"):
        pretrain_job(corpus, examples=[text]).check()


def test_what_the_manifest_says_of_the_text_is_kept(corpus, tmp_path):
    """A unigram loss that is infinite is null there; how line breaks were read goes to answers."""
    job = pretrain_job(corpus, steps=1)
    info = {"unigram_loss": None, "config": {"source": {"html_breaks": "keep"}}}
    job = replace(job, manifest=job.manifest.model_copy(update={"info": info}))
    result = execute_bare(job, Folder(tmp_path), on_progress=lambda record: None)
    assert "unigram_loss" not in result
    assert huggingface.read_preprocessing(Folder(result["model"]))["html_breaks"] == "keep"
    card = Folder(result["model"]).read_text("README.md")
    assert "nats a masked token\n" in card and "nan" not in card


def test_fillings_are_of_the_masks_in_their_order(corpus):
    task, tokenizer = task_of(pretrain_job(corpus)), Tokenizer.load(corpus)
    model = task.model.eval()
    both = predictions(model, tokenizer, "the [MASK] was [MASK]", top=4)
    assert [len(guesses) for guesses in both] == [4, 4]
    ids = torch.from_numpy(tokenizer.encode_batch(["the [MASK] was [MASK]"])[0].astype(np.int64))
    with torch.inference_mode():
        logits = model.logits(ids[None], None, torch.tensor([4]))
    best = logits.softmax(-1)[0].argmax()
    assert both[1][0]["token"] == tokenizer.hf.id_to_token(int(best))
    with pytest.raises(DataError, match=r"'plain' has no \[MASK\]"):
        predictions(model, tokenizer, "plain")
