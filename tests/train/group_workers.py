"""The scenarios of test_distributed.py: each runs on all ranks and returns its results."""

import contextlib
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from making import (
    Attempt,
    Scripted,
    committed,
    damage,
    finetune_job,
    gloo_group,
    gradients_of,
    pretrain_job,
)
from sharding_workers import FAST

from raybert.data.masking import IGNORE_INDEX
from raybert.errors import DamagedError, RaybertError, UserError
from raybert.storage.folder import Folder
from raybert.tasks.masked_lm import PretrainSpec
from raybert.train.checkpoint import CheckpointStore
from raybert.train.distributed import Group
from raybert.train.run import TrainingRun
from raybert.train.run_folder import begin_attempt
from raybert.train.task import ReplicasDiffer, Stopped


class Uneven(Scripted):
    """Leaves few predicted tokens in the second half of the micro-batches."""

    def batches(self, first_step, total_steps):
        for batches in self._task.batches(first_step, total_steps):
            for batch in batches:
                if batch.micro_batch_index >= 2:
                    batch.labels.flags.writeable = True
                    batch.labels[:, 6:] = IGNORE_INDEX
            yield batches


def uneven(corpus, run, group, **settings):
    """Gradients of two steps of four micro-batches with uneven counts of predicted tokens."""
    values = {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "max_grad_norm": 1e9}
    job = pretrain_job(corpus, **{**values, **settings})
    attempt = Attempt(job, run, group=group, change=Uneven)
    with gradients_of(attempt.loop) as steps:
        attempt.run()
    return {"gradients": steps, "weights": attempt.task.model.state_dict()}


def not_a_number_on_one_rank(corpus, run, group):
    job = pretrain_job(corpus, steps=3)
    bad = group.world_size - 1
    attempt = Attempt(
        job,
        run,
        group=group,
        change=lambda task: Scripted(
            task, factor=lambda b: math.nan if b.step == 1 and group.rank == bad else 1.0
        ),
    )
    result = attempt.run()
    return {"skipped": result["skipped"], "weights": attempt.task.model.state_dict()}


def stop_on_one_rank(corpus, run, group):
    """Only the last rank is asked to stop; both stop, at the same step."""
    job = pretrain_job(corpus, steps=6)
    stop_at = 2 if group.rank == group.world_size - 1 else None
    attempt = Attempt(job, run, group=group, stop_at=stop_at)
    try:
        attempt.run()
    except Stopped:
        return {"step": attempt.loop.progress.step, "saved": attempt.store.steps()}
    return {"step": None}


def stop_for_good(corpus, run, group):
    """The gradient of one rank is not finite; both end with the error."""
    job = pretrain_job(corpus, steps=3, on_non_finite="stop")
    change = lambda task: Scripted(  # noqa: E731
        task, factor=lambda b: math.inf if group.rank == 0 else 1.0
    )
    try:
        Attempt(job, run, group=group, change=change).run()
    except RaybertError as error:
        return {"error": str(error)}
    return {"error": None}


def broken_checkpoint(corpus, run, group):
    """Rank 0 can't write a checkpoint, and the run must stop for that: both end."""

    def in_the_way(batch):
        if batch.step == 1 and group.rank == 0 and not run.exists("checkpoints"):
            run.write_text("checkpoints", "a file where a folder should be")

    job = pretrain_job(corpus, steps=500, checkpoint_steps=2, on_checkpoint_failure="stop")
    attempt = Attempt(job, run, group=group, on_batch=in_the_way)
    try:
        attempt.run()
    except (UserError, Stopped) as error:
        return {"step": attempt.loop.progress.step, "error": type(error).__name__}
    return {"step": None}


def whole_epoch(corpus, run, group):
    """In the last step of an epoch the last rank may have no row."""
    job = pretrain_job(corpus, steps=None, epochs=2, micro_batch_size=1, global_batch_size=2)
    attempt = Attempt(job, run, group=group)
    result = attempt.run()
    return {"tokens": result["tokens"], "step": result["step"], "loss": result["loss"]}


def fine_tuning(corpus, run, group):
    """Frozen, then thawed, so that the model is wrapped in DDP twice."""
    del corpus
    folder = Folder(run.path + "-data")
    if group.rank == 0:
        finetune_job(folder)
    group.gather(None)
    job = finetune_job(folder, steps=None, epochs=2, frozen_epochs=0.5, global_batch_size=8)
    attempt = Attempt(job, run, group=group)
    result = attempt.run()
    keys = ("step", "accuracy", "tokens")
    return {**{k: result[k] for k in keys}, "weights": attempt.task.model.state_dict()}


def resumed(corpus, run, group):
    """A deterministic run, once uninterrupted and once stopped and resumed."""
    job = pretrain_job(corpus, {"dropout": 0.1}, steps=5, deterministic=True)
    once = Attempt(job, run / "whole", group=group)
    once.run()
    try:
        Attempt(job, run / "parted", group=group, stop_at=2).run()
    except Stopped:
        pass
    group.gather(None)
    again = Attempt(job, run / "parted", group=group)
    again.run()
    return {"whole": once.task.model.state_dict(), "parted": again.task.model.state_dict()}


class Level(Scripted):
    """All evaluations are equal, so the first is the best; step 5's gradient is not finite."""

    def __init__(self, task):
        super().__init__(task, factor=lambda batch: math.inf if batch.step == 5 else 1.0)

    def evaluate(self):
        self.evaluated = {k: v.clone() for k, v in self._task.model.state_dict().items()}
        return {**self._task.evaluate(), "score": 1.0}


def lagging_listing(corpus, run, group):
    """The storage lists no checkpoint to the second rank: it goes by what the first one read."""
    settings = {"evaluations": 3, "checkpoint_steps": 2, "on_non_finite": "rollback"}
    job = pretrain_job(corpus, steps=6, **settings)
    try:
        Attempt(job, run, group=group, stop_at=3, change=Level).run()
    except Stopped:
        pass
    group.gather(None)
    again = Attempt(job, run, group=group, change=Level)
    if group.rank > 0:
        again.store._commits = list
    result = again.run()
    found = {key: result[key] for key in ("step", "best_step", "skipped", "restarts")}
    return {"found": found, "weights": again.task.evaluated}


def altered_on_one_rank(corpus, run, group):
    """A bit of the last rank's weights changes in step 1; the next evaluation is after step 2."""
    job = pretrain_job(corpus, steps=4, evaluations=2)

    def alter(batch):
        if batch.step == 1 and group.rank == 1:
            weight = next(attempt.task.model.parameters()).detach()
            weight.flatten().view(torch.int32)[0] ^= 1

    attempt = Attempt(job, run, group=group, on_batch=alter)
    try:
        attempt.run()
    except ReplicasDiffer as error:
        return {"step": attempt.loop.progress.step, "error": str(error)}
    return {"step": attempt.loop.progress.step, "error": None}


class WaitsAndWorks(Scripted):
    """The second rank waits for data, the first one works slowly."""

    def __init__(self, task, group):
        self._waits = 0.1 * (group.rank == 1)
        works = 0.2 * (group.rank == 0 and group.world_size > 1)
        super().__init__(task, factor=lambda batch: time.sleep(works) or 1.0)

    def batches(self, first_step, total_steps):
        for batches in self._task.batches(first_step, total_steps):
            time.sleep(self._waits)
            yield batches


def slow_ranks(corpus, run, group):
    job = pretrain_job(corpus, steps=4, log_every=4)
    attempt = Attempt(job, run, group=group, change=lambda task: WaitsAndWorks(task, group))
    attempt.run()
    return attempt.of_kind("train")


class Slow:
    """What rank 0 does alone ends only after a few more collectives of all ranks."""

    def __init__(self, group):
        self._group, self.calls, self.read = group, 0, Counter()

    @contextlib.contextmanager
    def storage(self):
        sum_of, read_bytes = Group.sum, Folder.read_bytes

        def count(group, values):
            self.calls += 1
            return sum_of(group, values)

        def read(folder, name):
            data = read_bytes(folder, name)
            if "checkpoints" in folder.path:
                self.read[name] += len(data)
                self.wait()
            return data

        Group.sum, Folder.read_bytes = count, read
        try:
            yield
        finally:
            Group.sum, Folder.read_bytes = sum_of, read_bytes

    def wait(self):
        if self._group.world_size > 1:
            calls, ends = self.calls, time.monotonic() + 30
            while self.calls < calls + 3:
                assert time.monotonic() < ends, "the other ranks hear nothing of rank 0"
                time.sleep(0.001)


class SlowToFinish(PretrainSpec):
    def finish(self, task, run, metrics):
        slow.wait()
        return super().finish(task, run, metrics)


class Worse(Scripted):
    """The first evaluation is the best, so its weights are read at the end."""

    calls = 0

    def evaluate(self):
        self.calls += 1
        return {**self._task.evaluate(), "score": -float(self.calls)}


def slow_storage(corpus, run, group):
    """Reading takes longer than a collective may: to resume, to roll back, and at the end."""
    global slow
    slow = Slow(group)
    values = {"steps": 6, "evaluations": 3, "checkpoint_steps": 1, "on_non_finite": "rollback"}
    job = pretrain_job(corpus, average_decay=0.9, collective_timeout_s=0.02, **values)
    job = SlowToFinish(**vars(job))
    change = lambda task: Worse(  # noqa: E731
        task, factor=lambda batch: math.nan if batch.step == 4 else 1.0
    )
    try:
        Attempt(job, run, group=group, stop_at=3, change=change).run()
    except Stopped:
        pass
    group.gather(None)
    with slow.storage():
        attempt = group.first(lambda: begin_attempt(run), 0.02)
        training = TrainingRun(job, run, attempt, group)
        training.task = training.loop.task = change(training.task)
        training.loop._evaluator._task = training.loop._step._task = training.task
        training.run()
    found = {key: training.result.get(key) for key in ("step", "best_step", "skipped", "restarts")}
    return {"read": dict(slow.read), "found": found}


def damaged_everywhere(corpus, run, group):
    """Rank 0 alone reads; its error is that of all ranks."""
    job = pretrain_job(corpus, steps=4, checkpoint_steps=1)
    try:
        Attempt(job, run, group=group, stop_at=2).run()
    except Stopped:
        pass
    group.gather(None)
    if group.rank == 0:
        for step in (1, 2):
            damage(committed(run, step) / "state.json", "cut")
    group.gather(None)
    try:
        Attempt(job, run, group=group).run()
    except DamagedError as error:
        return {"error": str(error), "left": CheckpointStore(run, 9, 1).steps()}
    return {"error": None}


SCENARIOS = {
    "uneven": uneven,
    "deterministic": lambda *args: uneven(*args, deterministic=True),
    "bf16_gradients": lambda *args: uneven(*args, gradients="bf16", bucket_mb=1),
    "not_a_number": not_a_number_on_one_rank,
    "stop_on_one_rank": stop_on_one_rank,
    "stop_for_good": stop_for_good,
    "broken_checkpoint": broken_checkpoint,
    "whole_epoch": whole_epoch,
    "fine_tuning": fine_tuning,
    "resumed": resumed,
    "lagging_listing": lagging_listing,
    "altered_on_one_rank": altered_on_one_rank,
    "slow_ranks": slow_ranks,
    "slow_storage": slow_storage,
    "damaged_everywhere": damaged_everywhere,
    **FAST,
}


def work(rank, folder, world_size):
    """Run every scenario as one of `world_size` processes."""
    found = {}
    with gloo_group(rank, f"{folder}/rendezvous", world_size, timeout_s=60) as group:
        for name, scenario in SCENARIOS.items():
            run = Folder(Path(folder) / f"{name}-{world_size}")
            found[name] = scenario(Folder(Path(folder) / "corpus"), run, group)
        torch.save(found, Path(folder) / f"found-{world_size}-{rank}.pt")


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
