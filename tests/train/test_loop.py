"""The training loop without Ray: exact resumption, accumulation, failures."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
from making import (
    Attempt,
    Scripted,
    committed,
    cut_batch,
    damage,
    finetune_job,
    gradients_of,
    make_corpus,
    pretrain_job,
    same_tensors,
)

from raybert.data.masking import IGNORE_INDEX
from raybert.errors import RaybertError
from raybert.storage.folder import Folder
from raybert.train.distributed import Group
from raybert.train.loop import MAX_SKIPPED_IN_A_ROW
from raybert.train.metrics_log import read_metrics
from raybert.train.task import ControlSignals, LoaderConfig, Stopped


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_overfitted(corpus, run, optimizer):
    job = pretrain_job(
        corpus,
        {"hidden_size": 32},
        optimizer=optimizer,
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
def test_a_resumed_pretraining_equals_an_uninterrupted_one_bit_for_bit(corpus, tmp_path, stop_at):
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
def test_a_resumed_fine_tuning_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stop_at):
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])  # sgd has no state of its own
@pytest.mark.parametrize("stop_at", [2, 5, 9])
def test_a_resumed_run_with_averages_equals_an_uninterrupted_one_bit_for_bit(
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
    assert bool(left.optimizer) == (optimizer != "sgd")
    assert same_tensors(once.task.model.state_dict(), again.task.model.state_dict())


def test_the_averages_are_what_is_evaluated_and_kept(tmp_path):
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


def test_a_run_pauses_at_every_evaluation(tmp_path):
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


def test_a_run_that_is_closed_resumes_where_it_was_saved(tmp_path):
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


def test_frozen_layers_keep_their_weights(tmp_path):
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


def test_a_resumed_run_with_fewer_steps_than_it_took_ends(corpus, run):
    with pytest.raises(Stopped):
        Attempt(pretrain_job(corpus, steps=8), run, stop_at=5).run()
    result = Attempt(pretrain_job(corpus, steps=3), run).run()
    assert result["step"] == 5


def test_a_resumed_run_with_more_steps_takes_the_rest(corpus, run):
    with pytest.raises(Stopped):
        Attempt(pretrain_job(corpus, steps=4), run, stop_at=3).run()
    longer = Attempt(pretrain_job(corpus, steps=6), run)
    assert longer.run()["step"] == 6
    assert [record["step"] for record in longer.of_kind("train")] == [4, 5, 6]


# Accumulation ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_that_resumes_with_smaller_micro_batches_reads_the_same_rows(corpus, tmp_path, stage):
    """And takes the same steps, but for rounding; the encoder has no dropout here."""
    values = {"steps": 6, "global_batch_size": 8, "deterministic": True}
    if stage == "pretrain":
        make = lambda **more: pretrain_job(corpus, {"dropout": 0.0}, **values, **more)  # noqa: E731
    else:
        make = lambda **more: finetune_job(  # noqa: E731
            Folder(tmp_path), dropout=0.0, **values, **more
        )
    digests, found = [], []
    for sizes in ((4, 4), (4, 1)):
        run, read = Folder(tmp_path) / f"{stage}-{sizes[1]}", {}
        for size, stop_at in zip(sizes, (3, None), strict=True):
            job = replace(make(micro_batch_size=size), order_micro_batch_size=4)
            attempt = Attempt(
                job,
                run,
                stop_at=stop_at,
                on_batch=lambda b, read=read: read.update({(b.step, b.digest()): len(b.row_ids)}),
            )
            with pytest.raises(Stopped) if stop_at else contextlib.nullcontext():
                attempt.run()
        digests.append(read)
        found.append(attempt.task.model.state_dict())
    assert digests[0] == digests[1] and len(digests[0]) == 12
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-3, atol=1e-4)


def test_the_loss_is_divided_by_the_predicted_tokens_of_the_global_batch(corpus, run):
    """With uneven counts, where the mean of the micro-batches' means is another number."""
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


def test_dropout_depends_on_the_micro_batch_not_on_the_order_of_work(corpus, tmp_path):
    job = pretrain_job(corpus, {"dropout": 0.3}, steps=1, max_grad_norm=1e9)
    [batches] = first_batches(job)
    found = []
    for name, order in (("in order", batches), ("reversed", batches[::-1])):
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


# Non-finite gradients ----------------------------------------------------------------------------


def infinite_at(*steps):
    return lambda task: Scripted(task, factor=lambda b: math.inf if b.step in steps else 1.0)


def test_skip_keeps_the_weights_of_a_non_finite_step(corpus, tmp_path):
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


def test_a_non_finite_loss_is_null_in_the_metrics(corpus, run):
    Attempt(pretrain_job(corpus), run, change=infinite_at(1)).run()
    losses = [r["loss"] for r in read_metrics(run) if r["kind"] == "train"]
    assert losses[1] is None
    assert None not in (losses[0], losses[2], losses[3])
    for line in (run / "metrics").read_text("0001.jsonl").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("log_every", [1, 2, 4])
def test_a_skipped_step_does_not_count_in_the_mean_loss(corpus, tmp_path, log_every):
    """The loss of a line is that of the steps that were taken; of none it is undefined."""
    found = {}
    for every in {1, log_every}:
        attempt = Attempt(
            pretrain_job(corpus, log_every=every),
            Folder(tmp_path / str(every)),
            change=infinite_at(1),
        )
        attempt.run()
        found[every] = {r["step"]: r["loss"] for r in attempt.of_kind("train")}
    each, lines = found[1], found[log_every]
    for step, loss in lines.items():
        taken = [each[s] for s in range(step - log_every + 1, step + 1) if s != 2]
        if taken:
            assert min(taken) - 1e-4 <= loss <= max(taken) + 1e-4
        else:
            assert math.isnan(loss)


def test_stop_ends_the_run_and_names_the_key_to_change(corpus, run):
    job = pretrain_job(corpus, on_non_finite="stop")
    with pytest.raises(
        RaybertError, match=r"^step 2: the gradient's norm is .*; lower pretrain.lr=0.001"
    ):
        Attempt(job, run, change=infinite_at(2)).run()


def test_rollback_restores_the_last_checkpoint(corpus, run):
    job = pretrain_job(corpus, steps=4, checkpoint_steps=2, on_non_finite="rollback")
    attempt = Attempt(job, run, change=infinite_at(3))  # a step was taken since the checkpoint
    attempt.run()
    assert attempt.events()["skipped step"].endswith("weights are those of step 2 again")
    last, before = attempt.store.load(4), attempt.store.load(2)
    assert same_tensors(last.model, before.model)
    assert same_tensors(last.optimizer, before.optimizer)


def test_too_many_non_finite_steps_in_a_row_end_the_run(corpus, run):
    job = pretrain_job(corpus, steps=100)
    with pytest.raises(RaybertError, match=f"for {MAX_SKIPPED_IN_A_ROW + 1} steps in a row"):
        Attempt(job, run, change=infinite_at(*range(100))).run()


def test_a_first_score_of_nan_is_not_the_best(corpus, run):
    class Scores(Scripted):
        def evaluate(self):
            score = math.nan if attempt.loop.progress.step < 2 else 1.0
            return {**self._task.evaluate(), "score": score}

    attempt = Attempt(pretrain_job(corpus, evaluations=4), run, change=Scores)
    assert attempt.run()["best_step"] == 2


# Budget, evaluation, stopping --------------------------------------------------------------------


def test_minutes_become_steps_once_and_resumption_keeps_them(corpus, run):
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


def test_other_minutes_on_resumption_become_steps_by_the_speed_so_far(corpus, run):
    begun = Attempt(pretrain_job(corpus, steps=1000), run, stop_at=20)
    with pytest.raises(Stopped):
        begun.run()
    seconds = begun.store.load(20).state["seconds"]
    minutes = seconds * 2 / 60  # from steps to minutes: twice the time so far
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


def test_minutes_after_too_few_steps_are_measured_anew(corpus, run):
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
    with pytest.raises(RaybertError, match="a micro-batch of step 2, expected 1"):
        attempt.run()


@pytest.mark.parametrize("lost", [False, True])
def test_the_result_describes_the_weights_in_the_model(corpus, run, lost):
    """The second of three evaluations is the best; its checkpoint may be damaged."""

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


def test_evaluations_are_spread_evenly_and_include_the_end(corpus, run):
    attempt = Attempt(pretrain_job(corpus, steps=10, evaluations=4), run)
    attempt.run()
    assert [r["step"] for r in attempt.of_kind("eval")] == [2, 5, 8, 10]  # round(2.5) is 2


def test_without_a_number_evaluation_follows_every_epoch(corpus, run):
    job = pretrain_job(corpus, steps=None, epochs=2.5, evaluations=None)
    attempt = Attempt(job, run)
    attempt.run()
    epoch = attempt.task.steps_per_epoch
    assert [r["step"] for r in attempt.of_kind("eval")] == [epoch, 2 * epoch, round(2.5 * epoch)]


def test_each_evaluation_fills_the_masks_of_the_examples(corpus, run):
    job = pretrain_job(corpus, examples=["the [MASK] was wonderful"])
    attempt = Attempt(job, run)
    attempt.run()
    [filling] = attempt.of_kind("eval")[-1]["fillings"]
    assert filling["text"] == "the [MASK] was wonderful"
    shares = [guess["probability"] for guess in filling["tokens"]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)


def test_an_epoch_reads_every_token_of_the_corpus_once(corpus, run):
    job = pretrain_job(corpus, steps=None, epochs=1)
    result = Attempt(job, run).run()
    assert result["tokens"] == job.manifest.splits["train"].rows * job.manifest.seq_len


def test_the_mask_rate_falls_over_the_run_where_configured(corpus, tmp_path):
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
    # While a run limited by minutes measures its speed, the rate stays at its initial value.
    measuring = task.batches(0, None)
    early = [next(measuring) for _ in range(8)]
    found = [sum(b.count for b in s) / sum(b.labels.size for b in s) for s in early]
    assert sum(found) / 8 > 0.4
