"""The scenarios of test_sharding.py: each runs on all ranks and returns its results."""

import functools
import math
import shutil
import sys
from pathlib import Path

import torch
from making import Attempt, Scripted, gloo_group, make_corpus, pretrain_job

from raybert.storage.folder import Folder
from raybert.train import step
from raybert.train.compiled_layers import CompiledLayers
from raybert.train.optimizers import optimizer_tensors
from raybert.train.task import Stopped

SHARDINGS = ("none", "optimizer", "full")
MODEL = {"num_layers": 2, "hidden_size": 32, "dropout": 0.1}


def local_bytes(tensors):
    """The bytes that this rank holds of tensors."""
    return sum(
        (t.to_local() if hasattr(t, "to_local") else t).untyped_storage().nbytes() for t in tensors
    )


def job_of(corpus, sharding, **settings):
    """Steps of four micro-batches: of three ranks one has two, and one may have no row."""
    values = {"global_batch_size": 8, "micro_batch_size": 2, "average_decay": 0.9, "lr": 5e-3}
    model = {**MODEL, **settings.pop("model", {})}
    return pretrain_job(corpus, model, sharding=sharding, **{**values, **settings})


def train(job, run, group, stop_at=None, **options):
    """Train to the end, or up to `stop_at`; the losses, and what is left on this rank."""
    attempt = Attempt(job, run, group=group, stop_at=stop_at, **options)
    try:
        attempt.run()
    except Stopped:
        pass
    state = attempt.loop.state
    return {
        "losses": {r["step"]: r["loss"] for r in attempt.of_kind("train")},
        "norms": [r["grad_norm"] for r in attempt.of_kind("train")],
        "evaluations": [r["loss"] for r in attempt.of_kind("eval")],
        "weights": attempt.task.model.state_dict(),
        "skipped": attempt.loop.progress.skipped,
        "best_step": attempt.loop.progress.best_step,
        "bytes": {
            "optimizer": local_bytes(
                t for k, t in optimizer_tensors(state.optimizer).items() if not k.endswith("|step")
            ),
            "averages": local_bytes(state.averages.tensors().values()),
            "trained": local_bytes(state.model.parameters()),
        },
    }


def each(corpus, run, group, shardings=SHARDINGS, **settings):
    """Four steps of each kind of sharding."""
    return {
        sharding: train(job_of(corpus, sharding, **settings), run / sharding, group)
        for sharding in shardings
    }


def in_turn(corpus, run, group):
    """A run whose every step is another kind's, from the checkpoint of the one before."""
    losses = {}
    for before, sharding in enumerate((*SHARDINGS, "none")):
        found = train(job_of(corpus, sharding, evaluations=4), run, group, stop_at=before + 1)
        losses |= found["losses"]
    return {"losses": losses, "evaluations": found["evaluations"]}


class SecondIsBest(Scripted):
    """The last rank's gradient is not finite in step 1; the evaluation after it is the best."""

    calls = 0

    def __init__(self, task, group):
        bad = group.rank == group.world_size - 1
        super().__init__(task, factor=lambda b: math.nan if b.step == 1 and bad else 1.0)

    def evaluate(self):
        self.calls += 1
        return {**self._task.evaluate(), "score": float(self.calls == 2)}


def not_a_number(corpus, run, group):
    """A step is taken back; the run ends with the weights of an evaluation before the last."""
    settings = {"steps": 4, "evaluations": 4, "on_non_finite": "rollback", "checkpoint_steps": 1}
    change = functools.partial(SecondIsBest, group=group)
    return {
        sharding: train(job_of(corpus, sharding, **settings), run / sharding, group, change=change)
        for sharding in ("none", "full")
    }


def deterministic(corpus, run, group):
    """Once uninterrupted, and once stopped and resumed."""
    job = job_of(corpus, "full", steps=3, deterministic=True, activation_checkpointing=True)
    once = train(job, run / "whole", group)
    train(job, run / "parted", group, stop_at=1)
    return once, train(job, run / "parted", group)


FAST = {
    "sharding": lambda *args: each(*args, evaluations=4),
    "sharding_in_turn": in_turn,
    "sharding_muon": lambda *args: each(
        *args, ("none", "full"), optimizer="muon", model={"layout": "classic"}
    ),
    "sharding_nan": not_a_number,
    "sharding_deterministic": deterministic,
}

# Long --------------------------------------------------------------------------------------------

STEPS, STOP = 50, 20


def long(folder, group):
    """50 steps of each; each checkpoint of step 20 goes on as each other one."""
    corpus, size = folder / "corpus", group.world_size
    found = {}
    for sharding in SHARDINGS:
        job = job_of(corpus, sharding, steps=STEPS)
        found[sharding] = train(job, folder / f"{sharding}-{size}", group)
        stopped = folder / f"{sharding}-{size}-for-others"
        train(job, stopped, group, stop_at=STOP)
        for other in SHARDINGS:
            run = folder / f"{sharding}-{size}-to-{other}"
            if group.rank == 0:
                shutil.copytree(stopped.path, run.path)
            group.gather(None)
            job = job_of(corpus, other, steps=STEPS)
            found[f"{sharding} to {other}"] = train(job, run, group)
    return found


def taken_over(folder, group, size):
    """Checkpoints of another number of ranks go on here."""
    return {
        sharding: train(
            job_of(folder / "corpus", other, steps=STEPS),
            folder / f"{sharding}-{size}-for-others",
            group,
        )
        for sharding, other in zip(SHARDINGS, (*SHARDINGS[1:], "full"), strict=True)
    }


def compiled(folder, group):
    """Compiled layers that compute their values again, eager and as Dynamo traces them."""
    step.CompiledLayers = functools.partial(CompiledLayers, backend="aot_eager")
    found = {}
    for sharding in SHARDINGS:
        for compile in (False, True):
            job = job_of(
                folder / "corpus",
                sharding,
                compile=compile,
                activation_checkpointing=True,
                model={"dropout": 0.0},
            )
            name = f"compiled-{sharding}-{compile}-{group.world_size}"
            found[sharding, compile] = train(job, folder / name, group)["losses"]
    return found


def work(rank, folder, size):
    """Run as one of `size` processes."""
    here = Folder(folder)
    with gloo_group(rank, f"{folder}/rendezvous-{size}", size, timeout_s=120) as group:
        found = {
            "long": long(here, group),
            "bf16": each(here / "corpus", here / f"bf16-{size}", group, gradients="bf16"),
            "compiled": compiled(here, group),
        }
        if size == 3:
            found["taken over"] = taken_over(here, group, 2)
        if size == 1:
            found["taken over"] = taken_over(here, group, 3)
        torch.save(found, Path(folder) / f"found-{size}-{rank}.pt")


if __name__ == "__main__":
    if not (Path(sys.argv[2]) / "corpus").exists():
        make_corpus(Folder(sys.argv[2]) / "corpus", documents=51)
    work(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
