"""Runs: what may change when one is resumed, Ctrl-C, and a storage that refuses."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from making import make_corpus, pretrain_job, same_tensors

from raybert.config import dump, load
from raybert.errors import ConfigError, DataError, StorageError, Superseded
from raybert.experiment import Experiment
from raybert.storage.folder import Folder
from raybert.train.checkpoint import CheckpointStore
from raybert.train.metrics_log import MERGED, read_metrics
from raybert.train.run import train_in_process
from raybert.train.run_folder import (
    CONFIG,
    RESULT,
    begin_attempt,
    open_run,
    order_micro_batch_size,
    read_digests,
)
from raybert.train.settings import MAY_CHANGE


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("run")) / "corpus"
    make_corpus(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path) / "run"


def yaml(*overrides):
    return dump(load(Experiment, None, overrides))


def reopen(run, *overrides, stage="pretrain", sections=("corpus", "model")):
    return open_run(run, yaml(*overrides), stage, sections)


# The configuration of a run ----------------------------------------------------------------------


def test_a_changed_setting_is_refused_with_its_key_and_both_values(run):
    assert reopen(run, "pretrain.lr=0.001") is None
    with pytest.raises(ConfigError) as caught:
        reopen(run, "pretrain.lr=0.002", "pretrain.seed=7")
    assert str(caught.value) == (
        f"{run} has begun with other settings (pretrain.lr: 0.001 -> 0.002; pretrain.seed: "
        "0 -> 7); set them back, or choose another run.name"
    )


def test_a_run_refuses_other_inputs_than_it_began_with(run):
    reopen_on(run, corpus="a", tokenizer="b")
    assert reopen_on(run, corpus="a", tokenizer="b") is None
    with pytest.raises(DataError, match="was started with another corpus; restore it"):
        reopen_on(run, corpus="z", tokenizer="b")


def reopen_on(run, **inputs):
    return open_run(run, yaml(), "pretrain", ("corpus", "model"), inputs=inputs)


def test_allowed_changes_are_logged(run):
    messages = []
    reopen(run, "pretrain.steps=10")
    open_run(run, yaml("pretrain.steps=20", "pretrain.workers=2"), "pretrain", log=messages.append)
    assert messages == [
        "goes on with other settings: pretrain.steps: 10 -> 20; pretrain.workers: 1 -> 2"
    ]
    messages.clear()
    open_run(run, yaml("pretrain.steps=20", "pretrain.workers=2"), "pretrain", log=messages.append)
    assert messages == []


def test_a_run_from_before_a_setting_existed_had_its_default(run):
    reopen(run)
    lines = run.read_text(CONFIG).splitlines(keepends=True)
    added = ("  optimizer:", "  patience:", "    mask_rate:")
    old = "".join(line for line in lines if not line.startswith(added))
    assert old.count("\n") < len(lines) - len(added)
    run.write_text(CONFIG, old)
    messages = []
    assert open_run(run, yaml(), "pretrain", log=messages.append) is None
    assert messages == []
    run.write_text(CONFIG, old)
    with pytest.raises(ConfigError, match=r"pretrain.optimizer: 'adamw' -> 'sgd'"):
        reopen(run, "pretrain.optimizer=sgd")
    with pytest.raises(ConfigError, match=r"pretrain.masking.mask_rate: 0.2 -> 0.3"):
        reopen(run, "pretrain.masking.mask_rate=0.3")


@pytest.mark.parametrize(
    "override", ["corpus.seq_len=64", "model.num_layers=3", "pretrain.masking.mask_rate=0.3"]
)
def test_a_change_that_affects_the_result_is_refused(run, override):
    reopen(run)
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        reopen(run, override)


@pytest.mark.parametrize(
    "overrides",
    [
        ["finetune.lr=0.5"],
        ["evaluate.source.split=train"],
        ["ray.logs=true"],
        ["pretrain.workers=2"],
        ["pretrain.minutes=5"],
        ["pretrain.log_every=3", "pretrain.evaluations=2"],
    ],
)
def test_other_stages_budget_workers_and_logging_may_change(run, overrides):
    reopen(run)
    assert reopen(run, *overrides) is None
    assert run.read_text(CONFIG) == yaml(*overrides)


def test_every_setting_that_may_change_may_change(run):
    reopen(run)
    before = Experiment().pretrain.model_dump()
    values = {"steps": 3, "tokens": 3, "minutes": 3, "gpu": "no", "on_non_finite": "stop"}
    values |= {"on_checkpoint_failure": "stop", "examples": "[a]"}
    values |= {"milestones": "[3]", "branch_from": "a@3"}
    for key in MAY_CHANGE:
        value = values.get(key)
        if value is None:
            value = True if key == "digests" else (before[key] or 0) + 1
        limit = {"steps", "tokens", "minutes"} & {key}
        more = ["pretrain.epochs=null"] if limit else []
        assert reopen(run, f"pretrain.{key}={value}", *more) is None


ROUNDS = ("pretrain.micro_batch_size=8", "pretrain.compile=true", "pretrain.precision=bf16")


@pytest.mark.parametrize("override", ROUNDS)
def test_what_changes_only_how_numbers_are_rounded_may_change_unless_the_run_is_exact(
    run, tmp_path, override
):
    reopen(run)
    assert reopen(run, override) is None
    exact = Folder(tmp_path) / "exact"
    reopen(exact, "pretrain.deterministic=true")
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        reopen(exact, "pretrain.deterministic=true", override)


def test_the_order_of_a_run_keeps_its_first_micro_batches(run):
    reopen(run, "pretrain.micro_batch_size=32")
    assert order_micro_batch_size(run) is None
    for size in (8, 16, 32):
        reopen(run, f"pretrain.micro_batch_size={size}")
        assert order_micro_batch_size(run) == 32


def test_a_finished_run_gives_its_result_and_still_refuses_changes(run):
    reopen(run)
    run.write_json(RESULT, {"step": 9})
    before = run.read_text(CONFIG)
    assert reopen(run, "pretrain.log_every=3") == {"step": 9}
    assert run.read_text(CONFIG) == before
    with pytest.raises(ConfigError, match="is finished with other settings"):
        reopen(run, "pretrain.lr=0.5")


# In one process ----------------------------------------------------------------------------------


def test_a_run_leaves_model_result_metrics_and_digests(corpus, run):
    job = pretrain_job(corpus, steps=3, digests=True)
    result = train_in_process(job, run, on_progress=lambda record: None)
    assert result["step"] == 3
    assert result == run.read_json(RESULT)
    assert (run / "model").exists("config.json")
    assert (run / "model").exists("model.safetensors")
    assert run.exists(MERGED)
    assert [r["step"] for r in read_metrics(run) if r["kind"] == "train"] == [1, 2, 3]
    digests = read_digests(run)
    assert sorted(digests) == [(step, slot) for step in range(3) for slot in range(2)]
    assert len(set.union(*digests.values())) == 6
    assert result["machine"]["threads"] == 1


def worsening_job(corpus):
    return pretrain_job(
        corpus,
        steps=6,
        evaluations=3,
        lr=0.3,  # so high that later evaluations are worse
        schedule="constant",
        seed=1,
        packed_documents="joined",
    )


def test_the_model_has_the_weights_of_the_best_evaluation(corpus, run):
    from raybert.model import huggingface

    job = worsening_job(corpus)
    result = train_in_process(job, run, on_progress=lambda record: None)
    evaluations = [r for r in read_metrics(run) if r["kind"] == "eval"]
    best = max(evaluations, key=lambda record: record["score"])["step"]
    assert result["best_step"] == best
    store = CheckpointStore(run, 99, keep=2)
    found = huggingface.load_masked_lm(run / "model").state_dict()
    expected = store.load(best).model
    for name in found:
        assert torch.equal(found[name], expected[name])
    others = [step for step in store.steps() if step != best]
    assert not all(same_tensors(store.load(step).model, expected) for step in others)


def test_the_result_and_the_card_have_the_figures_of_the_best_evaluation(corpus, run):
    job = worsening_job(corpus)
    result = train_in_process(job, run, on_progress=lambda record: None)
    evaluations = [r for r in read_metrics(run) if r["kind"] == "eval"]
    best = max(evaluations, key=lambda record: record["score"])
    assert best["step"] < 6
    assert result["loss"] == best["loss"] != evaluations[-1]["loss"]
    assert result["score"] == result["best_score"] == best["score"]
    assert f"Held-out loss: {best['loss']:.4f}" in (run / "model").read_text("README.md")


def test_a_result_that_is_undefined_is_strict_json(corpus, run):
    class Undefined:
        def __init__(self, job):
            self._job = job

        def __getattr__(self, name):
            return getattr(self._job, name)

        def finish(self, task, run, metrics):
            return {"undefined": math.nan, "nested": [math.inf, 1.5]}

    job = Undefined(pretrain_job(corpus, steps=1))
    result = train_in_process(job, run, on_progress=lambda record: None)
    assert (result["undefined"], result["nested"]) == (None, [None, 1.5])
    json.loads(run.read_text(RESULT), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


class Interrupts:
    """Presses Ctrl-C when one of these steps is logged."""

    def __init__(self, at):
        self._at = at

    def __call__(self, record):
        if record["kind"] == "train" and record["step"] in self._at:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_the_run_resumes_bit_for_bit(corpus, tmp_path):
    job = pretrain_job(corpus, {"dropout": 0.1}, steps=6)
    whole, parted = Folder(tmp_path / "whole"), Folder(tmp_path / "parted")
    train_in_process(job, whole, on_progress=lambda record: None)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_in_process(job, parted, on_progress=Interrupts([4]))
    assert signal.getsignal(signal.SIGINT) == before
    assert CheckpointStore(parted, 99, 2).steps() == [4]
    assert not parted.exists(RESULT)
    assert train_in_process(job, parted, on_progress=lambda record: None)["step"] == 6
    left, right = (CheckpointStore(run, 99, 2).load(6) for run in (whole, parted))
    assert same_tensors(left.model, right.model)
    assert same_tensors(left.optimizer, right.optimizer)


def test_ctrl_c_at_the_end_of_a_run_is_raised_after_the_result(corpus, run):
    def interrupt(record):
        if record["kind"] == "eval":  # the only one: all steps are taken
            os.kill(os.getpid(), signal.SIGINT)

    job = pretrain_job(corpus, steps=2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_in_process(job, run, on_progress=interrupt)
    assert signal.getsignal(signal.SIGINT) == before
    assert run.read_json(RESULT)["step"] == 2


def test_a_second_ctrl_c_interrupts_at_once(corpus, run):
    def twice(record):
        if record["kind"] == "train" and record["step"] == 2:
            signal.raise_signal(signal.SIGINT)  # handled here and now: pending ones would be one
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_in_process(pretrain_job(corpus), run, on_progress=twice)
    assert CheckpointStore(run, 99, 2).steps() == []


def test_a_run_in_another_thread_handles_no_signals(corpus, run):
    before = signal.getsignal(signal.SIGINT)
    results = []
    job = pretrain_job(corpus, steps=2)
    thread = threading.Thread(
        target=lambda: results.append(train_in_process(job, run, on_progress=lambda record: None))
    )
    thread.start()
    thread.join()
    assert results[0]["step"] == 2
    assert signal.getsignal(signal.SIGINT) == before


# A storage that refuses --------------------------------------------------------------------------


def block(run, name):
    """Put a file where the run needs a folder, so that nothing can be written there."""
    run.write_text(name, "a file where a folder should be")


def weights(run, step=4):
    return CheckpointStore(run, 99, 2).load(step).model


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """An uninterrupted run of `pretrain_job`, with digests."""
    run = Folder(tmp_path_factory.mktemp("undisturbed"))
    train_in_process(pretrain_job(corpus, digests=True), run, on_progress=lambda record: None)
    return run


@pytest.mark.parametrize("name", ["metrics", "digests"])
def test_no_line_is_lost_while_the_storage_refuses(corpus, run, undisturbed, monkeypatch, name):
    monkeypatch.setattr("raybert.train.line_log.RETRY_SECONDS", 0.0)
    block(run, name)
    messages = []

    def watch(record):
        if record.get("event") == "storage":
            messages.append(record["message"])
        if record["kind"] == "train" and record["step"] == 3:
            run.delete(name)

    result = train_in_process(pretrain_job(corpus, digests=True), run, on_progress=watch)
    assert result["step"] == 4
    assert len(messages) == 2
    assert messages[0].endswith("; its lines wait until it can be written")
    assert messages[1].endswith(" is written again")
    assert [r["step"] for r in read_metrics(run) if r["kind"] == "train"] == [1, 2, 3, 4]
    assert read_digests(run) == read_digests(undisturbed)
    assert same_tensors(weights(run), weights(undisturbed))


def test_digests_that_are_never_written_do_not_end_a_run(corpus, run):
    block(run, "digests")
    messages = []
    job = pretrain_job(corpus, digests=True)
    result = train_in_process(
        job, run, on_progress=lambda r: messages.append(r["message"]) if "message" in r else None
    )
    assert result["step"] == 4
    assert messages[-1] == f"{run}/digests/0001-0000.txt lacks the last 8 lines"


def test_a_digest_that_was_cut_off_is_left_out(corpus, undisturbed, tmp_path):
    run = Folder(tmp_path)
    text = (undisturbed / "digests").read_text("0001-0000.txt")
    (run / "digests").write_text("0001-0000.txt", text[:-5])
    assert len(read_digests(run)) == len(read_digests(undisturbed)) - 1


def test_a_model_that_can_not_be_written_is_an_error_and_the_run_resumes(corpus, run, undisturbed):
    block(run, "model")
    job = pretrain_job(corpus, collective_timeout_s=0.1)
    messages = []
    with pytest.raises(
        StorageError,
        match="^writing .*/model/model.safetensors failed: .*; fix the storage, and run it again "
        "to resume from the checkpoint of step 4$",
    ):
        train_in_process(job, run, on_progress=messages.append)
    assert "retrying for up to" in messages[-1]["message"]
    run.delete("model")
    result = train_in_process(job, run, on_progress=lambda record: None)
    assert (result["step"], result["restarts"]) == (4, 1)
    assert same_tensors(weights(run), weights(undisturbed))
    model = (run / "model").read_bytes("model.safetensors")
    assert model == (undisturbed / "model").read_bytes("model.safetensors")


def test_writing_the_model_is_retried(corpus, run, undisturbed):
    block(run, "model")

    def mend(record):
        if record.get("event") == "storage":
            run.delete("model")

    result = train_in_process(pretrain_job(corpus), run, on_progress=mend)
    assert (result["step"], result["restarts"]) == (4, 0)
    model = (run / "model").read_bytes("model.safetensors")
    assert model == (undisturbed / "model").read_bytes("model.safetensors")


def test_a_superseded_attempt_writes_no_model(corpus, run):
    block(run, "model")

    def overtake(record):
        if record.get("event") == "storage":
            run.delete("model")
            begin_attempt(run)

    with pytest.raises(Superseded):
        train_in_process(pretrain_job(corpus), run, on_progress=overtake)
    assert not run.exists("model")
