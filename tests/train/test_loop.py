"""The loop, bare: exact resumption, global averages, what it does when things go wrong."""

import contextlib
import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making import (
    Attempt,
    Scripted,
    cut_batch,
    finetune_job,
    gradients_of,
    make_corpus,
    pretrain_job,
    same_tensors,
)

from raybert.data.masking import IGNORE_INDEX
from raybert.errors import RaybertError, StorageError, Superseded, UserError
from raybert.storage.folder import Folder
from raybert.train.attempts import begin_attempt
from raybert.train.control import ControlSignals, Preempted, Stopped
from raybert.train.distributed import Group
from raybert.train.loop import MAX_SKIPPED_IN_A_ROW
from raybert.train.metrics_log import MetricsLog, read_metrics
from raybert.train.task import LoaderConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("loop")) / "corpus"
    make_corpus(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    return Folder(tmp_path) / "run"


def first_batches(job, steps=1):
    stream = job.make_task(Group(), LoaderConfig()).batches(0, steps)
    return [next(stream) for _ in range(steps)]


def test_one_batch_is_learned_by_heart(corpus, run):
    job = pretrain_job(
        corpus,
        {"hidden_size": 32},
        steps=60,
        lr=2e-2,
        global_batch_size=4,
        weight_decay=0.0,
        warmup_fraction=0.0,
    )
    [batches] = first_batches(job)
    again = [[replace(batch, step=step) for batch in batches] for step in range(60)]
    attempt = Attempt(job, run, change=lambda task: Scripted(task, batches=again))
    attempt.run()
    losses = [record["loss"] for record in attempt.of_kind("train")]
    assert losses[0] > 3.0
    assert losses[-1] < 0.1


# Resumption --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_resumed_pretraining_equals_an_undisturbed_one_bit_for_bit(corpus, tmp_path, stop_at):
    job = pretrain_job(corpus, {"dropout": 0.2}, steps=8, evaluations=4)
    whole, parted = Folder(tmp_path / "whole"), Folder(tmp_path / "parted")
    once = Attempt(job, whole)
    once.run()
    with pytest.raises(Stopped, match=f"stopped at step {stop_at}; run it again"):
        Attempt(job, parted, stop_at=stop_at).run()
    again = Attempt(job, parted)
    again.run()
    assert again.of_kind("train")[0]["step"] == stop_at + 1
    left, right = once.store.load(8), again.store.load(8)
    assert same_tensors(left.model, right.model)
    assert same_tensors(left.optimizer, right.optimizer)
    assert left.state["tokens"] == right.state["tokens"]
    assert left.state["best_score"] == right.state["best_score"]


@pytest.mark.parametrize("stop_at", [3, 6, 12])  # frozen; where it thaws; thawed
def test_a_resumed_fine_tuning_equals_an_undisturbed_one_bit_for_bit(tmp_path, stop_at):
    job = finetune_job(Folder(tmp_path), steps=16, frozen_epochs=0.7, layer_decay=0.8)
    once = Attempt(job, Folder(tmp_path / "whole"))
    once.run()
    with pytest.raises(Stopped):
        Attempt(job, Folder(tmp_path / "parted"), stop_at=stop_at).run()
    again = Attempt(job, Folder(tmp_path / "parted"))
    again.run()
    left, right = once.store.load(16), again.store.load(16)
    assert same_tensors(left.model, right.model)
    assert same_tensors(left.optimizer, right.optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])  # sgd has no state of its own
@pytest.mark.parametrize("stop_at", [2, 5, 9])
def test_a_resumed_run_of_averages_equals_an_undisturbed_one_bit_for_bit(
    tmp_path, optimizer, stop_at
):
    settings = {"steps": 12, "evaluations": 4, "average_decay": 0.9, "lr": 1e-2}
    job = finetune_job(Folder(tmp_path), optimizer=optimizer, **settings)
    once = Attempt(job, Folder(tmp_path / "whole"))
    once.run()
    with pytest.raises(Stopped):
        Attempt(job, Folder(tmp_path / "parted"), stop_at=stop_at).run()
    again = Attempt(job, Folder(tmp_path / "parted"))
    again.run()
    left, right = once.store.load(12), again.store.load(12)
    assert same_tensors(left.model, right.model)
    assert same_tensors(left.optimizer, right.optimizer)
    assert same_tensors(left.averages, right.averages)
    assert left.averages.keys() == dict(once.task.model.named_parameters()).keys()
    assert bool(left.optimizer) == (optimizer == "adamw")
    assert same_tensors(once.task.model.state_dict(), again.task.model.state_dict())


def test_what_is_evaluated_and_kept_are_the_averages(tmp_path):
    """The finished model scores what the best evaluation said, and is not the last step's."""
    job = finetune_job(Folder(tmp_path), steps=8, evaluations=4, average_decay=0.9, lr=1e-2)
    attempt = Attempt(job, Folder(tmp_path / "run"))
    result = attempt.run()
    with torch.inference_mode():
        attempt.task.model.eval()
        found = attempt.task.evaluate()
    assert found["score"] == pytest.approx(result["best_score"])
    assert found["loss"] == pytest.approx(result["loss"])
    best = attempt.store.load(result["best_step"])
    assert not same_tensors(attempt.task.model.state_dict(), best.model)


def test_a_run_stands_still_at_every_evaluation(tmp_path):
    job = finetune_job(Folder(tmp_path), steps=6, evaluations=3)
    whole, parted = Attempt(job, Folder(tmp_path / "a")), Attempt(job, Folder(tmp_path / "b"))
    expected = whole.run()
    evaluations, records = parted.loop.evaluations(), []
    while True:
        try:
            records.append(next(evaluations))
        except StopIteration as end:
            result = end.value
            break
        assert parted.loop.progress.step == records[-1]["step"]
    assert [r["step"] for r in records] == [2, 4, 6]
    epoch = parted.task.steps_per_epoch
    assert [r["epoch"] for r in records] == [round(step / epoch, 4) for step in (2, 4, 6)]
    assert {r["total_steps"] for r in records} == {6}
    assert result["best_score"] == expected["best_score"] == max(r["score"] for r in records)
    left, right = whole.store.load(6), parted.store.load(6)
    assert same_tensors(left.model, right.model)


def test_a_run_that_is_left_goes_on_from_where_it_was_saved(tmp_path):
    job = finetune_job(Folder(tmp_path), steps=6, evaluations=3)
    whole, run = Attempt(job, Folder(tmp_path / "whole")), Folder(tmp_path / "left")
    whole.run()
    left = Attempt(job, run)
    evaluations = left.loop.evaluations()
    next(evaluations)
    left.loop.save()
    evaluations.close()
    assert not left.loop.log.is_open
    again = Attempt(job, run)
    again.run()
    assert [record["step"] for record in again.of_kind("train")] == [3, 4, 5, 6]
    assert same_tensors(whole.store.load(6).model, again.store.load(6).model)


def test_frozen_layers_keep_their_weights_until_they_thaw(tmp_path):
    job = finetune_job(Folder(tmp_path), steps=4, frozen_epochs=10.0)
    attempt = Attempt(job, Folder(tmp_path / "run"))
    before = {k: v.clone() for k, v in attempt.task.model.state_dict().items()}
    attempt.run()
    moved = {k for k, v in attempt.task.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert not any(name.startswith("encoder.") for name in moved)


def test_another_seed_gives_other_weights(corpus, tmp_path):
    found = []
    for seed in (0, 1):
        attempt = Attempt(pretrain_job(corpus, steps=2, seed=seed), Folder(tmp_path / str(seed)))
        attempt.run()
        found.append(attempt.store.load(2).model)
    assert not same_tensors(*found)


def test_fewer_steps_than_were_taken_end_the_run(corpus, run):
    with pytest.raises(Stopped):
        Attempt(pretrain_job(corpus, steps=8), run, stop_at=5).run()
    result = Attempt(pretrain_job(corpus, steps=3), run).run()
    assert result["step"] == 5


def test_more_steps_go_on_from_where_it_stood(corpus, run):
    with pytest.raises(Stopped):
        Attempt(pretrain_job(corpus, steps=4), run, stop_at=3).run()
    longer = Attempt(pretrain_job(corpus, steps=6), run)
    assert longer.run()["step"] == 6
    assert [record["step"] for record in longer.of_kind("train")] == [4, 5, 6]


# Averages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(corpus, tmp_path, pieces):
    job = pretrain_job(corpus, steps=1, global_batch_size=8, micro_batch_size=8, max_grad_norm=1e9)
    [[batch]] = first_batches(job)
    found = []
    for name, batches in (("whole", [batch]), ("pieces", cut_batch(batch, pieces))):
        attempt = Attempt(
            job,
            Folder(tmp_path / name),
            change=lambda task, batches=batches: Scripted(task, batches=[batches]),
        )
        with gradients_of(attempt.loop) as steps:
            attempt.run()
        found.append(steps[0])
    whole, accumulated = found
    assert whole.keys() == accumulated.keys()
    for name in whole:
        torch.testing.assert_close(accumulated[name], whole[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_divided_by_the_predicted_tokens_of_the_global_batch(corpus, run):
    """Uneven counts: a mean of the micro-batches' means would be another number."""
    job = pretrain_job(corpus, steps=1, max_grad_norm=1e9)
    [[first, second]] = first_batches(job)
    second.labels[1:] = IGNORE_INDEX
    assert first.count > 2 * second.count > 0
    attempt = Attempt(job, run, change=lambda task: Scripted(task, batches=[[first, second]]))
    model = attempt.task.model
    sums = [attempt.task.loss(model, batch) for batch in (first, second)]
    expected = torch.autograd.grad(sum(sums) / (first.count + second.count), model.parameters())
    sums = [float(value.detach()) for value in sums]
    mean_of_means = (sums[0] / first.count + sums[1] / second.count) / 2
    names = [name for name, _ in model.named_parameters()]
    with gradients_of(attempt.loop) as steps:
        attempt.run()
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(steps[0][name], gradient, rtol=1e-4, atol=1e-6)
    [record] = attempt.of_kind("train")
    assert record["loss"] == pytest.approx(sum(sums) / (first.count + second.count), abs=1e-4)
    assert abs(record["loss"] - mean_of_means) > 1e-3


def test_gradients_are_clipped_to_the_configured_norm(corpus, run):
    attempt = Attempt(pretrain_job(corpus, steps=1, max_grad_norm=0.01), run)
    with gradients_of(attempt.loop) as steps:
        attempt.run()
    norm = math.sqrt(sum(float(g.square().sum()) for g in steps[0].values()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert attempt.of_kind("train")[0]["grad_norm"] > 0.1  # what is logged is the norm before


def test_dropout_belongs_to_the_micro_batch_not_to_the_order_of_work(corpus, tmp_path):
    job = pretrain_job(corpus, {"dropout": 0.3}, steps=1, max_grad_norm=1e9)
    [batches] = first_batches(job)
    found = []
    for name, order in (("as they come", batches), ("turned round", batches[::-1])):
        attempt = Attempt(
            job,
            Folder(tmp_path / name),
            change=lambda task, order=order: Scripted(task, batches=[order]),
        )
        with gradients_of(attempt.loop) as steps:
            attempt.run()
        found.append(steps[0])
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-6)


# What is not finite ------------------------------------------------------------------------------


def infinite_at(*steps):
    return lambda task: Scripted(task, factor=lambda b: math.inf if b.step in steps else 1.0)


def test_skip_leaves_the_weights_of_an_undefined_step_alone(corpus, tmp_path):
    job = pretrain_job(corpus, steps=4, schedule="constant", warmup_fraction=0.0)
    attempt = Attempt(job, Folder(tmp_path / "a"), change=infinite_at(0, 1, 2, 3))
    before = {k: v.clone() for k, v in attempt.task.model.state_dict().items()}
    result = attempt.run()
    assert result["skipped"] == 4
    assert same_tensors(attempt.task.model.state_dict(), before)
    assert "step 3: the gradient's norm is" in attempt.events()["skipped step"]
    # One bad step among good ones costs that step only.
    attempt = Attempt(job, Folder(tmp_path / "b"), change=infinite_at(1))
    result = attempt.run()
    assert (result["step"], result["skipped"]) == (4, 1)
    assert all(torch.isfinite(v).all() for v in attempt.task.model.state_dict().values())


def test_an_undefined_loss_is_null_in_the_metrics(corpus, run):
    Attempt(pretrain_job(corpus), run, change=infinite_at(1)).run()
    losses = [r["loss"] for r in read_metrics(run) if r["kind"] == "train"]
    assert losses[1] is None
    assert None not in (losses[0], losses[2], losses[3])
    for line in (run / "metrics").read_text("0001.jsonl").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_stop_ends_the_run_and_says_what_to_change(corpus, run):
    job = pretrain_job(corpus, on_non_finite="stop")
    with pytest.raises(
        RaybertError, match=r"^step 2: the gradient's norm is .*; lower pretrain.lr=0.001"
    ):
        Attempt(job, run, change=infinite_at(2)).run()


def test_rollback_puts_the_last_checkpoint_back(corpus, run):
    job = pretrain_job(corpus, steps=4, checkpoint_steps=2, on_non_finite="rollback")
    attempt = Attempt(job, run, change=infinite_at(3))  # a step was taken since the checkpoint
    attempt.run()
    assert attempt.events()["skipped step"].endswith("weights are those of step 2 again")
    last, before = attempt.store.load(4), attempt.store.load(2)
    assert same_tensors(last.model, before.model)
    assert same_tensors(last.optimizer, before.optimizer)


def test_weights_that_stay_broken_end_the_run(corpus, run):
    job = pretrain_job(corpus, steps=100)
    with pytest.raises(RaybertError, match=f"for {MAX_SKIPPED_IN_A_ROW + 1} steps in a row"):
        Attempt(job, run, change=infinite_at(*range(100))).run()


def test_an_undefined_first_score_is_not_the_best_for_ever(corpus, run):
    class Scores(Scripted):
        def evaluate(self):
            score = math.nan if attempt.loop.progress.step < 2 else 1.0
            return {**self._task.evaluate(), "score": score}

    attempt = Attempt(pretrain_job(corpus, evaluations=4), run, change=Scores)
    assert attempt.run()["best_step"] == 2


# Budget, evaluation, stopping --------------------------------------------------------------------


def test_minutes_become_steps_once(corpus, run):
    job = pretrain_job(corpus, minutes=0.05, steps=None)
    first = Attempt(job, run)
    with pytest.raises(Stopped):
        first.loop.signals = ControlSignals(
            stop=lambda: first.loop.progress.total_steps is not None
        )
        first.run()
    total = first.store.load(first.store.steps()[-1]).state["total_steps"]
    assert total > first.loop.progress.step
    assert f"0.05 minutes are {total} steps" in first.events()["budget"]
    second = Attempt(job, run)
    result = second.run()
    assert result["step"] == result["total_steps"] == total
    assert "budget" not in second.events()
    lrs = [r["lr"] for r in [*first.of_kind("train"), *second.of_kind("train")]]
    assert max(lrs) <= job.config.lr
    # The schedule came to its end, one step before 0.
    assert lrs[-1] == pytest.approx(job.config.lr / (total - result["warmup_steps"]))


def test_other_minutes_on_resumption_are_turned_into_steps_by_the_speed_so_far(corpus, run):
    begun = Attempt(pretrain_job(corpus, steps=1000), run, stop_at=20)
    with pytest.raises(Stopped):
        begun.run()
    seconds = begun.store.load(20).state["seconds"]
    minutes = seconds * 2 / 60  # from steps to minutes: as long again as it took so far
    timed = pretrain_job(corpus, minutes=minutes, steps=None)
    changed = Attempt(timed, run, stop_at=22)
    with pytest.raises(Stopped):
        changed.run()
    total = changed.loop.progress.total_steps
    assert total == 20 + int(0.98 * 20)
    assert f"{minutes:g} minutes are {total} steps" in changed.events()["budget"]
    same = Attempt(timed, run, stop_at=23)
    with pytest.raises(Stopped):
        same.run()
    assert same.loop.progress.total_steps == total  # fixed once for these minutes
    assert "budget" not in same.events()
    fewer = Attempt(pretrain_job(corpus, minutes=minutes / 1e3, steps=None), run)
    assert fewer.run()["step"] == 23
    back = Attempt(pretrain_job(corpus, steps=25), run)
    assert back.run()["step"] == 25
    assert back.loop.progress.minutes is None


def test_a_change_to_minutes_before_there_is_a_speed_measures_it(corpus, run):
    with pytest.raises(Stopped):
        Attempt(pretrain_job(corpus, steps=1000), run, stop_at=1).run()
    attempt = Attempt(pretrain_job(corpus, minutes=0.01, steps=None), run)
    result = attempt.run()
    assert 3 <= result["step"] == result["total_steps"]
    assert result["minutes"] == 0.01
    assert "budget" in attempt.events()


def test_a_micro_batch_of_another_step_ends_the_run(corpus, run):
    job = pretrain_job(corpus, steps=3)
    batches = first_batches(job, 3)
    attempt = Attempt(
        job, run, change=lambda task: Scripted(task, batches=[batches[0], batches[2], batches[1]])
    )
    with pytest.raises(RaybertError, match="step 1 was given a micro-batch of step 2"):
        attempt.run()


@pytest.mark.parametrize("lost", [False, True])
def test_the_outcome_describes_the_weights_that_the_model_has(corpus, run, lost):
    """The second of three evaluations is the best; its checkpoint may get lost."""

    class Scores(Scripted):
        def evaluate(self):
            step = attempt.loop.progress.step
            if lost and step == 6:
                attempt.store.wait()
                damage(committed(run, 4) / "model.safetensors", "bit")
            return {"score": {2: 1.0, 4: 3.0, 6: 2.0}[step], "loss": float(step), "bad": math.nan}

    job = pretrain_job(corpus, steps=6, evaluations=3, keep_checkpoints=1)
    attempt = Attempt(job, run, change=Scores)
    result = attempt.run()
    step = 6 if lost else 4
    assert result["step"] == 6
    assert (result["best_step"], result["loss"]) == (step, float(step))
    assert result["score"] == result["best_score"] == (2.0 if lost else 3.0)
    assert "best_metrics" not in result
    assert same_tensors(attempt.task.model.state_dict(), attempt.store.load(step).model)
    state = attempt.store.load(6).state
    assert state["best_metrics"] == {"score": 3.0, "loss": 4.0, "bad": None}
    events = [r["message"] for r in read_metrics(run) if r.get("event") == "best checkpoint lost"]
    assert len(events) == lost
    assert all(message.endswith("has the weights of step 6 instead") for message in events)


def test_evaluations_are_spread_evenly_and_the_end_is_evaluated(corpus, run):
    attempt = Attempt(pretrain_job(corpus, steps=10, evaluations=4), run)
    attempt.run()
    assert [r["step"] for r in attempt.of_kind("eval")] == [2, 5, 8, 10]  # round(2.5) is 2


def test_without_a_number_evaluation_follows_every_epoch(corpus, run):
    job = pretrain_job(corpus, steps=None, epochs=2.5, evaluations=None)
    attempt = Attempt(job, run)
    attempt.run()
    epoch = attempt.task.steps_per_epoch
    assert [r["step"] for r in attempt.of_kind("eval")] == [epoch, 2 * epoch, round(2.5 * epoch)]


def test_the_examples_fillings_come_with_each_evaluation(corpus, run):
    job = pretrain_job(corpus, examples=["the [MASK] was wonderful"])
    attempt = Attempt(job, run)
    attempt.run()
    [filling] = attempt.of_kind("eval")[-1]["fillings"]
    assert filling["text"] == "the [MASK] was wonderful"
    shares = [guess["probability"] for guess in filling["tokens"]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)


def test_the_tokens_of_a_whole_epoch_are_the_corpus(corpus, run):
    job = pretrain_job(corpus, steps=None, epochs=1)
    result = Attempt(job, run).run()
    assert result["tokens"] == job.manifest.splits["train"].rows * job.manifest.seq_len


def test_a_falling_mask_rate_falls(corpus, tmp_path):
    masking = {"mask_rate": 0.6, "mask_rate_end": 0.1}
    job = pretrain_job(corpus, steps=40, masking=masking)
    task = job.make_task(Group(), LoaderConfig())
    stream = task.batches(0, 40)
    shares = []
    for _ in range(40):
        batches = next(stream)
        ordinary = sum((b.labels != IGNORE_INDEX).sum() for b in batches)
        shares.append(ordinary / sum(b.labels.size for b in batches))
    first, last = sum(shares[:8]) / 8, sum(shares[-8:]) / 8
    assert first > 0.4
    assert last < 0.2
    # While a run limited by minutes measures its speed, the rate is that of the beginning.
    measuring = task.batches(0, None)
    early = [next(measuring) for _ in range(8)]
    found = [sum(b.count for b in s) / sum(b.labels.size for b in s) for s in early]
    assert sum(found) / 8 > 0.4


# Checkpoints and attempts ------------------------------------------------------------------------


def committed(run, step):
    """The folder that a checkpoint's commit names."""
    checkpoints = Path((run / "checkpoints").path)
    commit = max(checkpoints.glob(f"step-{step:08d}-a*.json"))
    return checkpoints / json.loads(commit.read_text())["folder"]


def damage(path, how):
    data = path.read_bytes()
    if how == "bit":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


def four_steps(corpus, **settings):
    values = {"checkpoint_steps": 1, "keep_checkpoints": 3, **settings}
    return pretrain_job(corpus, {"dropout": 0.1}, steps=4, **values)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The last checkpoint of `four_steps` where nothing happens."""
    attempt = Attempt(four_steps(corpus), Folder(tmp_path_factory.mktemp("undisturbed")))
    attempt.run()
    return attempt.store.load(4)


def is_undisturbed(attempt, undisturbed):
    found = attempt.store.load(4)
    return same_tensors(found.model, undisturbed.model) and same_tensors(
        found.optimizer, undisturbed.optimizer
    )


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    ("how", "words"), [("bit", "is altered"), ("cut", "is cut short"), ("gone", "is missing")]
)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(
    corpus, run, undisturbed, file, how, words
):
    with pytest.raises(Stopped):
        Attempt(four_steps(corpus), run, stop_at=3).run()
    damage(committed(run, 3) / file, how)
    attempt = Attempt(four_steps(corpus), run)
    attempt.run()
    message = attempt.events()["damaged checkpoint"]
    assert f"step-00000003-a0001/{file}" in message
    assert words in message
    logged = [r["message"] for r in read_metrics(run) if r.get("event") == "damaged checkpoint"]
    assert logged == [message]
    assert attempt.of_kind("train")[0]["step"] == 3  # step 2's state was taken
    assert is_undisturbed(attempt, undisturbed)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bit", "step-00000003-a0001.json is altered"),
        ("cut", "step-00000003-a0001.json is damaged"),
        ("gone", None),
    ],
)
def test_a_checkpoint_without_a_whole_commit_gives_way(corpus, run, undisturbed, how, words):
    """Without a commit its files are those of an upload that was cut: nobody misses them."""
    with pytest.raises(Stopped):
        Attempt(four_steps(corpus), run, stop_at=3).run()
    damage(Path((run / "checkpoints").path) / "step-00000003-a0001.json", how)
    attempt = Attempt(four_steps(corpus), run)
    attempt.run()
    message = attempt.events().get("damaged checkpoint")
    assert message is None if words is None else words in message
    assert attempt.of_kind("train")[0]["step"] == 3
    assert is_undisturbed(attempt, undisturbed)
    assert not (run / "checkpoints").exists("step-00000003-a0001")


def test_resuming_at_a_step_that_is_due_keeps_its_checkpoint(corpus, run, monkeypatch):
    job = pretrain_job(corpus, steps=8, checkpoint_steps=4, keep_checkpoints=1)
    with pytest.raises(Stopped):
        Attempt(job, run, stop_at=4).run()
    assert committed(run, 4).name == "step-00000004-a0001"
    again = Attempt(job, run, stop_at=5)
    written = []
    write = again.store._write

    def notes(snapshot):
        written.append(snapshot.step)
        write(snapshot)

    monkeypatch.setattr(again.store, "_write", notes)
    with pytest.raises(Stopped):
        again.run()
    assert written == [5]
    assert again.store.steps() == [5]


def test_what_is_logged_is_on_the_storage_before_each_checkpoint(corpus, run, monkeypatch):
    """The steps before it are not taken again, and nobody would log them again."""
    done = []
    attempt = Attempt(
        pretrain_job(corpus, steps=6, checkpoint_steps=2),
        run,
        before_save=lambda: done.append(("digests", attempt.loop.progress.step)),
    )
    monkeypatch.setattr(
        MetricsLog, "flush", lambda self: done.append(("metrics", attempt.loop.progress.step))
    )
    save = attempt.store.save
    monkeypatch.setattr(
        attempt.store,
        "save",
        lambda snapshot, **more: (done.append(("save", snapshot.step)), save(snapshot, **more)),
    )
    attempt.run()
    for step in (2, 4, 6):
        at = done.index(("save", step))
        assert {("digests", step), ("metrics", step)} <= set(done[:at])


def test_what_checkpoints_took_is_logged_once_by_the_training_thread(corpus, run):
    """Over two attempts, the first of which is stopped between two checkpoints."""
    job = pretrain_job(corpus, steps=6, checkpoint_steps=2, keep_checkpoints=9)
    threads = []
    for stop_at in (3, None):
        attempt = Attempt(job, run, stop_at=stop_at)
        note = attempt.loop.log.on_record
        attempt.loop.log.on_record = lambda record, note=note: (
            note(record),
            threads.append(threading.current_thread()),
        )
        with pytest.raises(Stopped) if stop_at else contextlib.nullcontext():
            attempt.run()
    found = [r for r in read_metrics(run) if r["kind"] == "checkpoint"]
    assert [r["step"] for r in found] == [2, 3, 4, 6]
    for record in found:
        files = committed(run, record["step"]).iterdir()
        assert record["bytes"] == sum(file.stat().st_size for file in files)
    assert set(threads) == {threading.current_thread()}


def test_what_is_written_in_the_background_is_no_standstill(corpus, run, monkeypatch):
    """Not even for the last checkpoint, whose writing the loop waits for."""
    attempt = Attempt(pretrain_job(corpus, steps=2), run)
    write = attempt.store._write

    def write_when_counted(snapshot):
        ends = time.monotonic() + 30
        while not attempt.loop.saver._stalled:
            assert time.monotonic() < ends, "the standstill lasts as long as the writing"
            time.sleep(0.001)
        write(snapshot)

    monkeypatch.setattr(attempt.store, "_write", write_when_counted)
    attempt.run()
    [record] = attempt.of_kind("checkpoint")
    assert record["step"] == 2 and record["stalled"] > 0


def test_a_best_step_whose_checkpoint_is_gone_is_no_best_step(corpus, run):
    job = pretrain_job(corpus, steps=6, evaluations=3, checkpoint_steps=1)
    first = Attempt(job, run, stop_at=5)
    with pytest.raises(Stopped):
        first.run()
    best = first.loop.progress.best_step
    assert best is not None
    (run / "checkpoints").delete(f"step-{best:08d}-a0001.json")
    again = Attempt(job, run)
    again.run()
    assert again.loop.progress.best_step == 6


def test_a_younger_attempt_ends_the_older_one(corpus, run):
    old = Attempt(pretrain_job(corpus, checkpoint_steps=1), run)
    younger = begin_attempt(run)
    assert younger == 2
    with pytest.raises(Superseded, match="attempt 2 has taken over; attempt 1 ends here"):
        old.run()
    assert old.store.steps() == []


# A storage that refuses --------------------------------------------------------------------------


def refusing(attempt, monkeypatch, at):
    """Make the checkpoints of these steps fail, and let the loop hear of each at the next step.

    Returns the steps whose checkpoints were tried.
    """
    tried, write, check = [], attempt.store._write, attempt.store.check

    def fails(snapshot):
        tried.append(snapshot.step)
        if snapshot.step in at:
            raise StorageError("writing it failed: No space left on device")
        write(snapshot)

    def hear():
        if attempt.store._thread is not None:
            attempt.store._thread.join()
        check()

    monkeypatch.setattr(attempt.store, "_write", fails)
    monkeypatch.setattr(attempt.store, "check", hear)
    return tried


def test_a_failed_checkpoint_is_told_once_and_costs_the_run_nothing(
    corpus, run, undisturbed, monkeypatch
):
    attempt = Attempt(four_steps(corpus), run)
    tried = refusing(attempt, monkeypatch, at=[2, 3])
    assert attempt.run()["step"] == 4
    assert tried == [1, 2, 3, 4]
    events = [r for r in attempt.of_kind("event") if r["event"].startswith("checkpoint")]
    assert [r["event"] for r in events] == ["checkpoint failed", "checkpoint written"]
    assert events[0]["message"] == (
        "writing it failed: No space left on device; that of step 1 is kept; the next try is "
        "within a minute"
    )
    assert events[1]["message"] == "the checkpoint of step 4 is written"
    assert attempt.store.steps() == [1, 4]
    assert is_undisturbed(attempt, undisturbed)


@pytest.mark.parametrize(("pause", "expected"), [(0.0, [4, 5, 8]), (1e9, [4, 8])])
def test_a_failed_checkpoint_is_tried_again_soon(corpus, run, monkeypatch, pause, expected):
    monkeypatch.setattr("raybert.train.checkpoint_saver.RETRY_SECONDS", pause)
    attempt = Attempt(pretrain_job(corpus, steps=8, checkpoint_steps=4), run)
    tried = refusing(attempt, monkeypatch, at=[4])
    attempt.run()
    assert tried == expected


def test_where_checkpoints_may_not_fail_the_run_ends_and_goes_on(
    corpus, run, undisturbed, monkeypatch
):
    job = four_steps(corpus, on_checkpoint_failure="stop")
    attempt = Attempt(job, run)
    tried = refusing(attempt, monkeypatch, at=[2])
    with pytest.raises(UserError) as ended:
        attempt.run()
    assert str(ended.value) == (
        "writing it failed: No space left on device; the checkpoint of step 1 is whole: mend the "
        "storage, and run it again to go on from there, or set "
        "pretrain.on_checkpoint_failure=continue to train on without"
    )
    assert tried == [1, 2]
    assert attempt.store.steps() == [1]
    again = Attempt(job, run)
    again.run()
    assert again.of_kind("train")[0]["step"] == 2
    assert is_undisturbed(again, undisturbed)


@pytest.mark.parametrize("at", ["the end", "Ctrl-C"])
def test_the_last_checkpoint_may_not_fail_either(corpus, run, monkeypatch, at):
    job = pretrain_job(corpus, steps=4, on_checkpoint_failure="stop")
    attempt = Attempt(job, run)
    refusing(attempt, monkeypatch, at=[4 if at == "the end" else 2])
    if at == "Ctrl-C":
        attempt.loop.signals = ControlSignals(stop=lambda: attempt.loop.progress.step == 2)
    with pytest.raises(UserError, match="there is no checkpoint yet: mend the storage, and run it"):
        attempt.run()


def test_weights_that_can_not_be_read_for_a_while_are_waited_for(corpus, run, monkeypatch):
    """The best ones, at the end: others in their place would be another result."""

    class Scores(Scripted):
        def evaluate(self):
            return {**self._task.evaluate(), "score": -float(attempt.loop.progress.step)}

    attempt = Attempt(pretrain_job(corpus, steps=4, evaluations=2), run, change=Scores)
    load, failures = attempt.store.load, [1, 1]

    def fails_twice(step):
        if failures:
            failures.pop()
            raise StorageError("reading it failed: no answer")
        return load(step)

    monkeypatch.setattr(attempt.store, "load", fails_twice)
    monkeypatch.setattr("raybert.storage.retry.time.sleep", lambda seconds: None)
    result = attempt.run()
    assert (result["best_step"], failures) == (2, [])
    assert same_tensors(attempt.task.model.state_dict(), load(2).model)
    assert "no answer; it is tried again for 96 s" in attempt.events()["storage"]


# Wishes from outside -----------------------------------------------------------------------------


def test_a_checkpoint_that_is_asked_for_is_written_at_once(corpus, run):
    attempt = Attempt(pretrain_job(corpus, steps=6, keep_checkpoints=9), run)
    attempt.loop.signals = ControlSignals(save=lambda: attempt.loop.progress.step in (2, 3))
    attempt.run()
    assert {2, 3} <= set(attempt.store.steps())


def test_whoever_must_leave_leaves_after_a_checkpoint_and_nothing_is_lost(corpus, tmp_path):
    job = pretrain_job(corpus, {"dropout": 0.1}, steps=6)
    once = Attempt(job, Folder(tmp_path / "whole"))
    once.run()
    first = Attempt(job, Folder(tmp_path / "parted"))
    first.loop.signals = ControlSignals(preempt=lambda: first.loop.progress.step == 3)
    with pytest.raises(Preempted):
        first.run()
    assert "a node is about to go" in first.events()["eviction"]
    again = Attempt(job, Folder(tmp_path / "parted"))
    again.run()
    assert [record["step"] for record in again.of_kind("train")] == [4, 5, 6]
    assert same_tensors(once.store.load(6).model, again.store.load(6).model)
