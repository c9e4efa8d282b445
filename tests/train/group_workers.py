"""The scenarios of test_distributed.py: each runs on all ranks and returns its results."""

import math
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from making import Attempt, Scripted, finetune_job, gradients_of, pretrain_job

from raybert.data.masking import IGNORE_INDEX
from raybert.errors import RaybertError, UserError
from raybert.storage.folder import Folder
from raybert.train.distributed import Group
from raybert.train.task import Stopped


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


SCENARIOS = {
    "uneven": uneven,
    "deterministic": lambda *args: uneven(*args, deterministic=True),
    "not_a_number": not_a_number_on_one_rank,
    "stop_on_one_rank": stop_on_one_rank,
    "stop_for_good": stop_for_good,
    "broken_checkpoint": broken_checkpoint,
    "whole_epoch": whole_epoch,
    "fine_tuning": fine_tuning,
    "resumed": resumed,
    "lagging_listing": lagging_listing,
}


def work(rank, folder, world_size):
    """Run every scenario as one of `world_size` processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    group = Group.current(torch.device("cpu"))
    found = {}
    for name, scenario in SCENARIOS.items():
        run = Folder(Path(folder) / f"{name}-{world_size}")
        found[name] = scenario(Folder(Path(folder) / "corpus"), run, group)
    torch.save(found, Path(folder) / f"found-{world_size}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
