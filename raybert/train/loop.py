"""The one training loop: pretraining and fine-tuning each give it a task.

It knows nothing of Ray: it runs in one process, or in the workers of Ray Train. Ranks decide only
by sums over all of them (`StepTotals`) and by what rank 0 read, so they take the same branches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from raybert.errors import RaybertError
from raybert.records import EvalRecord, OnRecord, TrainRecord, ignore_record
from raybert.train.averages import WeightAverages
from raybert.train.budget import StepBudget
from raybert.train.checkpoint import CheckpointStore, Snapshot
from raybert.train.checkpoint_saver import CheckpointSaver
from raybert.train.distributed import Group
from raybert.train.metrics_log import MetricsLog
from raybert.train.optimizers import make_optimizer
from raybert.train.peaks import peak_flops
from raybert.train.profiling import StepProfiler
from raybert.train.settings import TrainConfig
from raybert.train.sharding import sharded_copy
from raybert.train.state import Progress, TrainState
from raybert.train.step import Evaluator, TrainStep
from raybert.train.task import NO_SIGNALS, Batch, ControlSignals, Preempted, Stopped, Task
from raybert.train.tensor_file import hash_tensors
from raybert.train.throughput import BatchStream, ThroughputMeter, slowest_ranks

MAX_SKIPPED_IN_A_ROW = 20  # after more steps that are not finite the weights are broken


class StepTotals(NamedTuple):
    """A step's numbers, summed over the ranks: by these sums all ranks take the same branches."""

    global_count: float  # predicted tokens, or rows, of the global batch
    tokens: float
    seconds: float  # of training so far, by rank 0's clock
    has_failed: float  # the last checkpoint could not be written, and the run must end
    save: float  # a checkpoint is wanted before the step
    stop: float
    preempt: float


class Loop:
    """A run of a task over a group of processes."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        group: Group,
        store: CheckpointStore,
        *,
        on_record: OnRecord = ignore_record,
        signals: ControlSignals = NO_SIGNALS,
        on_batch: Callable[[Batch], None] | None = None,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up a run; rank 0's records go to `on_record`.

        `on_batch` gets every micro-batch before it is trained on. `before_save` is called on every
        rank before each checkpoint: steps before one are never repeated.
        """
        self.task, self.config, self.group, self.store = task, config, group, store
        self.signals, self._before_save = signals, before_save
        model = task.model
        if config.shards != "none" and group.world_size > 1:
            model = sharded_copy(model, group.device, config.shards, config.gradients)
        optimizer = make_optimizer(model, config, task.lr_scale)
        averages = WeightAverages(model, config.average_decay)
        self.progress = Progress()
        self.state = TrainState(model, optimizer, averages, self.progress)
        self.log = MetricsLog(self.progress, on_record, is_first=group.rank == 0)
        self.saver = CheckpointSaver(store, group, config, self.log)
        self._step = TrainStep(task, config, group, self.state, on_batch)
        self._evaluator = Evaluator(task, config, group, self.state)
        self._budget = StepBudget(config, task, self.progress)
        self._meter = ThroughputMeter()
        self._profiler = StepProfiler(
            config.profile, store.run, group.rank, partial(self.log.event, "profile")
        )
        self._skipped_in_a_row = 0
        self._is_resumed = False
        self._damaged: list[str] = []  # messages of `resume`, for which no log is open yet
        self._loaded: str | None = None  # the hash of the weights resumed from, on rank 0

    def evaluations(self) -> Generator[EvalRecord, None, dict[str, Any]]:
        """Train to the end, paused at each evaluation, whose record is yielded.

        Leaves the best weights in the task's model and returns their metrics. The generator may be
        closed where it is paused: its checkpoints stay.

        Raises:
            Stopped: the run was asked to stop; run it again to resume.
            Preempted: a node will be taken away; continue with the others.
            UserError: a checkpoint can't be written, and the run must stop for that; on rank 0.
            StorageError: the best weights can't be read for `retry_timeout_s`.
            DamagedError: there are checkpoints, and all are damaged.
            ReplicasDiffer: the ranks have different weights.
            RaybertError: the gradients are not finite for too many steps.
        """
        task, config, progress, budget = self.task, self.config, self.progress, self._budget
        self.resume()
        self.log.open(self.store.run, self.store.attempt, self.group.world_size, self._loaded)
        for message in self._damaged:
            self.log.event("damaged checkpoint", message)
        try:
            if budget.begin():
                self.log.event("budget", str(budget))
            task.prepare(progress.step)
            self._step.wrap()
            self.state.check_replicas(self.group, with_optimizer=True)
            with contextlib.closing(BatchStream(task, progress, self._meter)) as stream:
                while not budget.is_spent and not self._is_out_of_patience():
                    batches = stream.next()
                    totals = self._sum_over_ranks(batches, stream.seconds())
                    self._obey(totals)
                    if task.prepare(progress.step):
                        self._step.wrap()
                    self._profiler.before(progress.step)
                    if self._step.run(batches, progress.step, totals.global_count, budget.lr()):
                        self._skipped_in_a_row = 0
                    else:
                        self._handle_non_finite()
                    self._profiler.after(progress.step)
                    progress.step += 1
                    progress.tokens += totals.tokens
                    self._meter.add(totals.tokens, stream.waited, self._step.own_seconds)
                    is_measured = budget.is_measured()
                    if progress.step % config.log_every == 0:
                        self._log_step()
                    if is_measured or budget.is_evaluation_due():
                        record = self._fix_budget(stream) if is_measured else self._evaluate()
                        with stream.paused():
                            yield record
            if self._is_out_of_patience():
                message = f"no better score in {config.patience} evaluations"
                self.log.event("stopped early", message)
            record = self._evaluate(is_last=True)
            self.save()
            [has_failed] = self.group.sum([self.saver.check_last_save()])
            self.saver.raise_if_failed(has_failed)
            yield record
            self.saver.wait()
            return self._evaluator.load_best(self.store, self.log)
        except (Exception, GeneratorExit):
            with contextlib.suppress(RaybertError):  # what is being written may be finished
                self.saver.wait()
            raise
        finally:
            self._profiler.close()
            self.log.close()

    def resume(self) -> None:
        """Load the latest complete checkpoint, if there is one; only the first call does."""
        if self._is_resumed:
            return
        self._is_resumed = True
        snapshot = self._load_latest(self._damaged.append)
        if snapshot is None:
            return
        self.progress.restore(snapshot.state)
        self.saver.resume_from(self.progress)
        self.progress.restarts += 1
        if self.progress.best_step not in self.group.first(self.store.steps, self._timeout_s):
            self.progress.forget_best()
        self.state.restore(snapshot)
        weights = self.state.whole_model(self.group)
        if self.group.rank == 0:  # of the loaded model, for the log
            self._loaded = hash_tensors(weights)

    def _load_latest(self, on_damaged: Callable[[str], None]) -> Snapshot | None:
        read = partial(self.store.load_latest, on_damaged)
        return self.state.load_on_all_ranks(read, self.group, self._timeout_s)

    @property
    def _timeout_s(self) -> float:
        return self.config.collective_timeout_s

    def snapshot(self) -> Snapshot:
        """Copy the run's state to the CPU of rank 0; all ranks call it."""
        return self.state.snapshot(self.group)

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of the current step, on all ranks; in the background unless `wait`."""
        began = time.perf_counter()
        # A resumed run does not repeat the steps before a checkpoint, nor their records.
        self._before_save()
        self.log.flush()
        self.saver.save(self.progress, self.snapshot, began=began, wait=wait)

    def _is_out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.stale_evaluations >= patience

    def _sum_over_ranks(self, batches: Sequence[Batch], seconds: float) -> StepTotals:
        """Sum what this step consists of, and what each rank asks for before it."""
        step, signals = self.progress.step, self.signals
        mine = StepTotals(
            global_count=sum(batch.count for batch in batches),
            tokens=sum(batch.tokens for batch in batches),
            seconds=seconds if self.group.rank == 0 else 0.0,
            has_failed=self.saver.check_last_save(),
            save=signals.save() or self.saver.is_due(step),
            stop=signals.stop(),
            preempt=signals.preempt(),
        )
        return StepTotals(*self.group.sum(mine))

    def _obey(self, totals: StepTotals) -> None:
        """Save, or save and end the run, where any rank asks for that."""
        step, self.progress.seconds = self.progress.step, totals.seconds
        self.saver.raise_if_failed(totals.has_failed)
        if totals.stop:
            self.save()
            self.saver.raise_if_failed(self.saver.has_failed)
            raise Stopped(f"stopped at step {step}; run it again to resume")
        if totals.preempt:
            self.log.event("preempted", "a node is being preempted: saving, then continuing")
            self.save()
            raise Preempted(f"a node is preempted at step {step}")
        if totals.save:
            self.save(wait=False)

    def _handle_non_finite(self) -> None:
        """Do what the configuration says after a step whose gradient is not finite."""
        progress, policy, section = self.progress, self.config.on_non_finite, self.config.section
        message = f"step {progress.step}: the gradient's norm is {self._step.grad_norm}"
        progress.skipped += 1
        self._skipped_in_a_row += 1
        remedy = f"lower {section}.lr={self.config.lr:g}"
        if policy == "stop":
            raise RaybertError(f"{message}; {remedy}, or set {section}.on_non_finite=skip")
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise RaybertError(f"{message}, for {self._skipped_in_a_row} steps in a row; {remedy}")
        if policy == "rollback":
            self.saver.wait_on_all_ranks()
            snapshot = self._load_latest(partial(self.log.event, "damaged checkpoint"))
            if snapshot is not None:
                self.state.restore(snapshot)
                message += f"; weights are those of step {snapshot.step} again"
        self.log.event("skipped step", message)

    def _fix_budget(self, stream: BatchStream) -> EvalRecord:
        """Evaluate, and turn minutes into steps: evaluations are part of the budget."""
        began = time.perf_counter()
        record = self._evaluate()
        seconds = time.perf_counter() - began if self.group.rank == 0 else 0.0
        [seconds] = self.group.sum([seconds])
        self._budget.set_total_steps(seconds)
        self.log.event("budget", str(self._budget))
        if self.task.needs_total:
            stream.close()  # the batches to come depend on the run's length
        record["total_steps"] = self.progress.total_steps
        return record

    def _evaluate(self, is_last: bool = False) -> EvalRecord:
        """Evaluate, log it, and save the weights if they are the best; returns the record."""
        self.state.check_replicas(self.group, with_optimizer=False)
        metrics, is_best = self._evaluator.evaluate()
        progress = self.progress
        record = cast(
            EvalRecord,
            {
                "kind": "eval",
                "step": progress.step,
                "epoch": self._epoch(),
                "seconds": round(progress.seconds, 2),
                **metrics,
            },
        )
        self.log.write(record)
        if is_best and not is_last:  # the end is saved anyway
            self.save(wait=False)
        else:
            self.log.flush()
        self._meter.restart()
        record["total_steps"] = progress.total_steps
        return record

    def _log_step(self) -> None:
        self.saver.log_committed()
        loss, times = self._step.mean_loss(), slowest_ranks(self.group, self._meter)
        progress, rates = self.progress, self._meter.read()
        flops = self.task.flops_per_token * rates["tokens_per_second"]
        peak = peak_flops(self.group.device) * self.group.world_size
        record = cast(
            TrainRecord,
            {
                "kind": "train",
                "step": progress.step,
                "loss": round(loss, 5),
                # The optimizer's own: layers that learn slower have a fraction of it.
                "lr": max(group["lr"] for group in self.state.optimizer.param_groups),
                "grad_norm": round(self._step.grad_norm, 4),
                "tokens_per_second": rates["tokens_per_second"],
                "step_seconds": rates["step_seconds"],
                "data_wait": rates["data_wait"],
                **times,
                "mfu": round(flops / peak, 4) if peak else None,
                "epoch": self._epoch(),
                "tokens": int(progress.tokens),
                "total_steps": progress.total_steps,
                "seconds": round(progress.seconds, 2),
            },
        )
        self.log.write(record)

    def _epoch(self) -> float:
        return round(self.progress.step / self.task.steps_per_epoch, 4)
