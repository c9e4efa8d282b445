"""The one training loop: pretraining and fine-tuning each give it a task.

It owns the budget, accumulation, precision, clipping, the schedule, evaluation, logging,
checkpoints and stopping. It knows nothing of Ray: one process runs it bare, and a Ray Train
worker is a thin adapter around it. Whatever ranks decide, they decide on numbers that all of
them have summed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from raybert.cluster.machine import has_fast_bf16
from raybert.data.keyed import key_of
from raybert.errors import DamagedError, RaybertError, StorageError
from raybert.storage.retry import retry
from raybert.train.checkpoint import CheckpointStore, Snapshot, hash_tensors
from raybert.train.checkpoint_schedule import CheckpointSaver
from raybert.train.distributed import Group
from raybert.train.metrics_log import MetricsLog, ThroughputMeter, finite
from raybert.train.optimizers import (
    average_weights,
    averaged,
    averages_in,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    schedule_at,
    set_lr,
    swap_averages,
)
from raybert.train.settings import TrainConfig
from raybert.train.task import NO_SIGNALS, Batch, ControlSignals, Preempted, Stopped, Task

MEASURED_SHARE = 0.02  # of a run's minutes, at least: the time that its speed is taken over
SETTLING_STEPS = 3  # at first libraries choose their kernels, and memory is mapped
SETTLING_SHARE = 0.5  # of that time, in which Ray Data fills its first blocks, too
MAX_SKIPPED_IN_A_ROW = 20  # after so many undefined steps the weights, not the data, are broken


@dataclass
class Progress:
    """How far a run has come: the part of a checkpoint that is not tensors."""

    step: int = 0
    total_steps: int | None = None  # None while a run limited by minutes measures its speed
    warmup_steps: int | None = None
    minutes: float | None = None  # the limit that total_steps was fixed by, if it was minutes
    tokens: float = 0.0
    seconds: float = 0.0  # of training, over all attempts
    best_score: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, Any] | None = None
    skipped: int = 0
    restarts: int = 0


class Loop:
    """A run of a task over a group of processes."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        group: Group,
        *,
        store: CheckpointStore | None = None,
        open_log: Callable[[int], MetricsLog] | None = None,
        on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
        signals: ControlSignals = NO_SIGNALS,
        on_batch: Callable[[Batch], None] | None = None,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up a run.

        Args:
            task: what is trained.
            config: how.
            group: with whom.
            store: where checkpoints go and come from; None: nowhere (benchmarks, unit tests).
            open_log: opens the metrics log at the step where the attempt starts; called by rank 0.
            on_progress: gets every logged record, on rank 0.
            signals: what others may want of the run; to end comes after a checkpoint.
            on_batch: gets every micro-batch before it is trained on; for digests.
            before_save: called on every rank before each checkpoint, which ends what is repeated.
        """
        self.task, self.config, self.group = task, config, group
        self._store, self._open_log = store, open_log
        self._on_progress, self._signals = on_progress, signals
        self._on_batch, self._before_save = on_batch, before_save
        self.progress = Progress()
        self._log: MetricsLog | None = None
        self._bf16 = config.precision == "bf16" or (
            config.precision == "auto" and has_fast_bf16(group.device)
        )
        self.optimizer = make_optimizer(task.model, config, task.lr_scale)
        self._module: nn.Module = task.model
        self._saver = CheckpointSaver(
            store if group.rank == 0 else None, config, self._write, self._event
        )
        self._damaged: list[str] = []  # what was found before there was a log
        self._found: list[dict[str, Any]] = []  # evaluations that nobody has been given yet
        self._resumed = False
        #: The hash of the weights that this attempt goes on from; None: fresh ones. On rank 0.
        self.loaded: str | None = None
        self._skipped_in_a_row = 0
        self._begun = (0, 0.0)  # steps and seconds at which this attempt began
        self._settled: tuple[int, float] | None = None  # the same, once its speed is steady
        self._loss = torch.zeros((), dtype=torch.float64, device=group.device)
        self._counted = 0.0
        self._rate = ThroughputMeter()

    # The run -----------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train until the budget is spent; leave the best weights in rank 0's model.

        Returns:
            The evaluation of these weights, and how far the run came.

        Raises:
            Stopped: it was asked to stop; run it again to go on.
            Evicted: a node goes away; go on with the others.
            UserError: a checkpoint can't be written, and the run is to stop for that; on rank 0.
            StorageError: the best weights can't be read, for minutes.
            RaybertError: the gradients stay undefined.
        """
        evaluations = self.evaluations()
        while True:
            try:
                next(evaluations)
            except StopIteration as end:
                result: dict[str, Any] = end.value
                return result

    def evaluations(self) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Run from evaluation to evaluation: yields the record of each, returns what `run` does.

        In between the run stands still, and may be left for good: its checkpoints stay.

        Raises:
            As `run`.
        """
        self.resume()
        if self.group.rank == 0 and self._open_log is not None:
            self._log = self._open_log(self.progress.step)
        try:
            for message in self._damaged:
                self._event("damaged checkpoint", message)
            last = yield from self._train()
            self._saver.wait()
            result = self._take_best(last)
        except (Exception, GeneratorExit):
            with contextlib.suppress(RaybertError):  # the one under way is worth the wait
                self._saver.wait()
            raise
        finally:
            if self._log is not None:
                self._log.close()
                self._log = None
        return result

    def tell(self, message: str) -> None:
        """Show and log what is to be said about the storage."""
        self._event("storage", message)

    def _train(self) -> Generator[dict[str, Any], None, dict[str, Any]]:
        config, progress, task = self.config, self.progress, self.task
        budget = config.budget(task.steps_per_epoch, task.tokens_per_epoch)
        if budget.steps is not None:
            progress.total_steps, progress.minutes = budget.steps, None
            progress.warmup_steps = round(budget.steps * config.warmup_fraction)
        elif progress.total_steps is not None and progress.minutes != budget.minutes:
            self._fix_total_again()
        task.prepare(progress.step)
        self._wrap()
        if progress.total_steps is None and task.needs_total:
            yield from self._train_until(lambda: progress.total_steps is not None)
        # A resumed run may be given fewer steps than it has taken.
        yield from self._train_until(lambda: progress.step >= (progress.total_steps or math.inf))
        last = self._evaluate(final=True)
        self._save(wait=True)
        [broken] = self.group.sum([self._saver.check_last_save()])
        self._saver.raise_if_failed(broken)
        yield from self._take_found()
        return last

    def _take_best(self, last: dict[str, Any]) -> dict[str, Any]:
        """Put the best weights into rank 0's model; the last ones are there if they can't be read.

        What is returned describes the weights that the model has: best_step is the step that they
        are of, and None where no evaluation gave a score.
        """
        progress, store, metrics = self.progress, self._store, last
        best, patience = progress.best_step, self.config.retry_timeout_s
        found = None
        if best == progress.step:
            metrics = progress.best_metrics or last
        elif best is not None and store is not None and self.group.rank == 0:
            try:
                found = retry(partial(store.load, best), patience, self.tell)
                metrics = progress.best_metrics or {}
            except DamagedError as error:
                message = f"{error}; the model has the weights of step {progress.step} instead"
                self._event("best checkpoint lost", message)
                score, step = last["score"], progress.step
                progress = replace(progress, best_score=score, best_step=step)
        if found is not None:
            averages = averages_in(found.optimizer) if self.config.average_decay else {}
            self.task.model.load_state_dict({**found.model, **averages})
        elif self.config.average_decay:
            swap_averages(self.optimizer)
        self.group.gather(None)  # rank 0 may need as long again for what is written next
        result = {**metrics, **asdict(progress)}
        del result["best_metrics"]
        return result

    def _train_until(self, done: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Train step after step, from one stream of batches; yields what is evaluated."""
        if done():
            return
        progress = self.progress
        stream = self.task.batches(progress.step, progress.total_steps)
        with contextlib.closing(stream):  # type: ignore[type-var]
            batches = next(stream)
            # The clock starts with the first batch: start-up is not training.
            self._rate, waited = ThroughputMeter(), 0.0
            begun = time.perf_counter() - progress.seconds
            self._begun = (progress.step, progress.seconds)
            while True:
                self._train_step(batches, waited, time.perf_counter() - begun)
                stood_still = time.perf_counter()
                yield from self._take_found()
                begun += time.perf_counter() - stood_still
                if done():
                    return
                asked = time.perf_counter()
                batches = next(stream)
                waited = time.perf_counter() - asked

    def _take_found(self) -> Iterator[dict[str, Any]]:
        """Yield the evaluations since the last call."""
        while self._found:
            yield self._found.pop(0)

    def _train_step(self, batches: Sequence[Batch], waited: float, clock: float) -> None:
        """Agree with the other ranks on what this step is, take it, and do what is due after it."""
        progress, first = self.progress, self.group.rank == 0
        for batch in batches:
            if batch.step != progress.step:
                raise RaybertError(
                    f"step {progress.step} was given a micro-batch of step {batch.step}: the "
                    "stream of batches has lost its place; run it again to go on from the last "
                    "checkpoint"
                )
        signals = self._signals
        count, tokens, seconds, broken, save, stop, preempt = self.group.sum(
            [
                sum(batch.count for batch in batches),
                sum(batch.tokens for batch in batches),
                clock if first else 0.0,
                self._saver.check_last_save(),
                signals.save() or self._saver.is_due(progress.step),
                signals.stop(),
                signals.preempt(),
            ]
        )
        progress.seconds = seconds
        self._saver.raise_if_failed(broken)
        if stop:
            self._save(wait=True)
            self._saver.raise_if_failed(self._saver.has_failed)
            raise Stopped(f"stopped at step {progress.step}; run it again to go on from there")
        if preempt:
            self._event("eviction", "a node is about to go: a checkpoint, and on without it")
            self._save(wait=True)
            raise Preempted(f"a node goes away at step {progress.step}")
        if save:
            self._save()
        if self.task.prepare(progress.step):
            self._wrap()
        self._step(batches, count)
        progress.step += 1
        progress.tokens += tokens
        self._rate.add(tokens, waited)
        if progress.total_steps is None:
            self._fix_total()
        if progress.step % self.config.log_every == 0:
            self._log_train()
        if progress.step in self._evaluation_steps():
            self._evaluate()

    def _step(self, batches: Sequence[Batch], count: float) -> None:
        """One optimizer step over this rank's micro-batches of it."""
        config, group, step = self.config, self.group, self.progress.step
        set_lr(self.optimizer, self.lr(step))
        work = [b for b in batches if b.count] or [self.task.empty_batch()]
        # DDP averages over ranks; a step's loss is the sum over all ranks by the global count.
        scale = group.world_size / max(1.0, count)
        for index, batch in enumerate(work):
            if self._on_batch is not None and batch.count:
                self._on_batch(batch)
            # Draws such as dropout's belong to the micro-batch, not to the rank that computes it.
            torch.manual_seed(key_of("draws", config.seed, step, batch.micro_batch_index) >> 1)
            last = index == len(work) - 1
            no_sync = getattr(self._module, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if last else no_sync():
                with torch.autocast(group.device.type, torch.bfloat16, enabled=self._bf16):
                    loss = self.task.loss(self._module, batch)
                torch.autograd.backward(loss * scale)
            self._loss += loss.detach()
        self._counted += sum(b.count for b in batches)
        self._update()

    def _update(self) -> None:
        parameters = [p for p in self.task.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm, foreach=True)
        self.grad_norm = float(norm)  # the same on all ranks: gradients are averaged by now
        if math.isfinite(self.grad_norm):
            self.optimizer.step()
            if self.config.average_decay:
                average_weights(self.optimizer, self.config.average_decay, self.progress.step)
            self._skipped_in_a_row = 0
        else:
            self._non_finite()
        self.optimizer.zero_grad(set_to_none=True)

    # Schedule and budget -------------------------------------------------------------------------

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        config, progress = self.config, self.progress
        if progress.total_steps is None or progress.warmup_steps is None:
            return config.lr * min(1.0, (progress.seconds + 1e-3) / self._measured_seconds())
        share = schedule_at(step, progress.total_steps, progress.warmup_steps, config)
        return config.lr * share

    def _measured_seconds(self) -> float:
        return (self.config.minutes or 0) * 60 * max(MEASURED_SHARE, self.config.warmup_fraction)

    def _fix_total(self) -> None:
        """At the end of warm-up, turn minutes into steps, once."""
        progress, minutes = self.progress, self.config.minutes
        taken = progress.step - 1  # the clock was read before this step
        # In this attempt: one that resumes a run in its warm-up has slow first steps of its own.
        taken_here, here = taken - self._begun[0], progress.seconds - self._begun[1]
        measured = self._measured_seconds()
        settled = taken_here >= SETTLING_STEPS and here >= SETTLING_SHARE * measured
        if self._settled is None and settled:
            self._settled = (taken, progress.seconds)
        if minutes is None or self._settled is None or here < measured:
            return
        steps, seconds = taken - self._settled[0], progress.seconds - self._settled[1]
        if not steps:
            return
        per_step = seconds / steps
        # Evaluations are part of the budget: one is run now, to see what it takes.
        asked = time.perf_counter()
        self._evaluate()
        took = time.perf_counter() - asked if self.group.rank == 0 else 0.0
        took = self.group.sum([took])[0]
        left = minutes * 60 - progress.seconds - took
        if self.config.evaluations is None:
            per_step += took / self.task.steps_per_epoch
        else:
            left -= took * self.config.evaluations
        steps = int(0.98 * left / per_step)  # checkpoints, and what else slows a machine: 2%
        progress.total_steps = progress.step + max(0, steps)
        progress.warmup_steps = progress.step
        progress.minutes = minutes
        self._event("budget", f"{minutes:g} minutes are {progress.total_steps:,} steps")

    def _fix_total_again(self) -> None:
        """A resumed run was given minutes, or others: turn them into steps by its speed so far."""
        progress, minutes = self.progress, self.config.minutes or 0.0
        if progress.step < 3 or not progress.seconds:  # no speed as yet: measure it
            progress.total_steps = progress.warmup_steps = None
            return
        left = minutes * 60 - progress.seconds
        steps = int(0.98 * left * progress.step / progress.seconds)
        progress.total_steps = progress.step + max(0, steps)
        progress.minutes = minutes
        if progress.warmup_steps is None or progress.step < progress.warmup_steps:
            progress.warmup_steps = round(progress.total_steps * self.config.warmup_fraction)
        self._event("budget", f"{minutes:g} minutes are {progress.total_steps:,} steps")

    def _evaluation_steps(self) -> frozenset[int]:
        """The steps after which to evaluate, but for the run's end."""
        total = self.progress.total_steps
        if total is None:
            return frozenset()
        if self.config.evaluations is None:
            return frozenset(range(self.task.steps_per_epoch, total, self.task.steps_per_epoch))
        n = self.config.evaluations
        return frozenset(round(total * i / n) for i in range(1, n)) - {total}

    # Evaluation and logging ----------------------------------------------------------------------

    def _evaluate(self, final: bool = False) -> dict[str, Any]:
        progress = self.progress
        model = self.task.model
        model.eval()
        with (
            averaged(self.optimizer) if self.config.average_decay else contextlib.nullcontext(),
            torch.inference_mode(),
            torch.autocast(self.group.device.type, torch.bfloat16, enabled=self._bf16),
        ):
            metrics = self.task.evaluate()
        model.train()
        score = metrics["score"]
        best = -math.inf if progress.best_score is None else progress.best_score
        if score > best:  # never where it is undefined
            progress.best_score, progress.best_step = score, progress.step
            progress.best_metrics = finite(metrics)
        record = {
            "kind": "eval",
            "step": progress.step,
            "epoch": round(progress.step / self.task.steps_per_epoch, 4),
            "seconds": round(progress.seconds, 2),
            **metrics,
        }
        self._write(record)
        self._found.append({**record, "total_steps": progress.total_steps})
        if progress.best_step == progress.step and not final:
            self._save()  # the log goes with it
        elif self._log is not None:
            self._log.flush()
        self._rate = ThroughputMeter()
        return metrics

    def _log_train(self) -> None:
        self._saver.log()
        loss, counted = self.group.sum([float(self._loss), self._counted])
        self._loss.zero_()
        self._counted = 0.0
        progress, rates = self.progress, self._rate.read()
        flops = self.task.flops_per_token * rates["tokens_per_second"]
        peak = peak_flops(self.group.device) * self.group.world_size
        self._write(
            {
                "kind": "train",
                "step": progress.step,
                "loss": round(loss / max(1.0, counted), 5),
                # As the optimizer had it; a part that learns slower has a share of it.
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "grad_norm": round(self.grad_norm, 4),
                **rates,
                "mfu": round(flops / peak, 4) if peak else None,
                "epoch": round(progress.step / self.task.steps_per_epoch, 4),
                "tokens": int(progress.tokens),
                "total_steps": progress.total_steps,
                "seconds": round(progress.seconds, 2),
            }
        )

    def _event(self, event: str, message: str) -> None:
        step = self.progress.step
        self._write({"kind": "event", "step": step, "event": event, "message": message})

    def _write(self, record: dict[str, Any]) -> None:
        if self.group.rank == 0:
            if self._log is not None:
                self._log.write(record)
            self._on_progress({**record, "total_steps": self.progress.total_steps})

    # State ---------------------------------------------------------------------------------------

    def _wrap(self) -> None:
        """Put the model into DDP; again after every change of what is trained."""
        module: nn.Module = self.task.model
        if self.config.compile:
            module = torch.compile(module)  # type: ignore[assignment]
        self._module = self.group.wrap(module, deterministic=self.config.deterministic)

    def snapshot(self) -> Snapshot:
        """Copy the run's state off the tensors that train on."""
        tensors = self.task.model.state_dict()
        return Snapshot(
            step=self.progress.step,
            model={k: v.detach().to("cpu", copy=True) for k, v in tensors.items()},
            optimizer={
                k: v.detach().to("cpu", copy=True).contiguous()
                for k, v in optimizer_tensors(self.optimizer).items()
            },
            state=asdict(self.progress),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights and optimizer state back; progress is the caller's business."""
        self.task.model.load_state_dict(snapshot.model)
        restore_optimizer(self.optimizer, snapshot.optimizer)

    def save(self) -> None:
        """Write a checkpoint of the step that the run stands at, and wait for it."""
        self._save(wait=True)

    def _save(self, wait: bool = False) -> None:
        begun = time.perf_counter()
        # Nobody takes the steps before a checkpoint again, nor logs them.
        self._before_save()
        if self._log is not None:
            self._log.flush()
        self._settle()
        best = self.progress.best_step
        self._saver.save(self._state(), self.snapshot, best_step=best, begun=begun)
        if wait:
            self._settle()
            self._saver.log()

    def _settle(self) -> None:
        """Wait until no checkpoint is being written, for as long as a slow storage takes.

        The others would take rank 0 for lost; so they wait with it, and hear of it at times.
        """
        seconds = self.config.collective_timeout_s / 4
        while self.group.sum([not self._saver.is_settled(seconds)])[0]:
            pass

    def _state(self) -> tuple[Any, ...]:
        """What makes a checkpoint worth writing: clocks aside, all that differs from the last."""
        progress = self.progress
        return progress.step, progress.total_steps, progress.minutes, progress.best_step

    def resume(self) -> None:
        """Load the youngest whole checkpoint, once: rank 0 finds it, the others load the same."""
        store, first = self._store, self.group.rank == 0
        if store is None or self._resumed:
            return
        self._resumed = True
        snapshot = store.load_latest(self._damaged.append) if first else None
        found = -1 if snapshot is None else snapshot.step
        step = int(self.group.sum([found if first else 0])[0])
        trouble = ""
        if step >= 0 and not first:
            try:
                snapshot = store.load(step)
            except (DamagedError, StorageError) as error:
                trouble = f"rank {self.group.rank}: {error}"
        troubles = list(filter(None, self.group.gather(trouble)))
        if troubles:
            raise StorageError(
                f"not every worker can read the checkpoint of step {step}; use a run.storage that "
                f"all nodes share ({troubles[0]})"
            )
        if snapshot is None:
            return
        progress = self.progress = Progress(**snapshot.state)
        self._saver.begin(self._state())
        progress.restarts += 1
        if progress.best_step not in store.steps():  # it gave way to one that was damaged
            progress.best_score = progress.best_step = progress.best_metrics = None
        self.restore(snapshot)
        if first:  # of the model itself, not of what was read: it is what a log can vouch for
            self.loaded = hash_tensors(self.task.model.state_dict())

    def _non_finite(self) -> None:
        """The gradient is infinite or undefined: do what the configuration says."""
        progress, policy = self.progress, self.config.on_non_finite
        message = f"step {progress.step}: the gradient's norm is {self.grad_norm}"
        progress.skipped += 1
        self._skipped_in_a_row += 1
        if policy == "stop" or self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            section = self.config.section
            remedy = f"lower {section}.lr={self.config.lr:g}"
            raise RaybertError(
                f"{message}; {remedy}, or set {section}.on_non_finite=skip"
                if policy == "stop"
                else f"{message}, for {self._skipped_in_a_row} steps in a row; {remedy}"
            )
        if policy == "rollback" and self._store is not None:
            self._settle()
            snapshot = self._store.load_latest(lambda text: self._event("damaged checkpoint", text))
            if snapshot is not None:
                self.restore(snapshot)
                message += f"; weights are those of step {snapshot.step} again"
        self._event("skipped step", message)


def peak_flops(device: torch.device) -> float:
    """Dense bf16 operations per second that the maker of a GPU states; 0 where unknown."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def peak_of(name: str) -> float:
    """The same, by the GPU's name."""
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "L4": 121e12}
    known |= {"V100": 125e12, "T4": 65e12, "B200": 2250e12, "A10": 125e12}
    return next((flops for chip, flops in known.items() if chip in name), 0.0)
