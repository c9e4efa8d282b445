"""A run: a folder that knows its configuration, its attempts and its result.

Running a name again resumes it; a finished run says so and does nothing. What continues a run must
be the run that was begun: apart from budget, workers and logging, no setting may differ.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch

from raybert.cluster.allocator import keep_freed_memory
from raybert.cluster.machine import describe_machine
from raybert.config import differences, parse_yaml
from raybert.errors import ConfigError, DataError, StorageError
from raybert.storage.folder import Folder
from raybert.storage.retry import retry
from raybert.train.checkpoint import CheckpointStore, begin_attempt, check_attempt
from raybert.train.checkpoint_schedule import resume_hint
from raybert.train.distributed import Group, use_threads
from raybert.train.loop import Loop
from raybert.train.metrics_log import LineLog, MetricsLog, finite, merge_metrics
from raybert.train.settings import MAY_CHANGE, TrainConfig
from raybert.train.task import NO_SIGNALS, Batch, ControlSignals, Stopped, Task

CONFIG, RESULT, INPUTS = "config.yaml", "result.json", "inputs.json"
DIGESTS = "digests"  # of every micro-batch: `<attempt>-<rank>.txt`


@dataclass(frozen=True)
class LoaderConfig:
    """Where a worker's batches are made: in its own process, or in Ray Data operators."""

    on_ray: bool = False
    cpus: float = 1.0  # logical CPUs that this worker's share of the operators may use
    memory: int = 256 << 20  # bytes of the object store that its blocks may fill


class TrainSpec(Protocol):
    """A stage of training, picklable: what is sent to the workers."""

    @property
    def config(self) -> TrainConfig:
        """The stage's settings."""

    def inputs(self) -> dict[str, str]:
        """Hashes of what the run reads, by a name for messages."""

    def make_task(self, group: Group, feed: LoaderConfig) -> Task:
        """Build the task on a worker."""

    def finish(self, task: Task, run: Folder) -> dict[str, Any]:
        """Write what the run is for, from the best weights; on rank 0. Returns lines of result."""


def open_run(
    run: Folder,
    config_yaml: str,
    stage: str,
    sections: tuple[str, ...] = (),
    *,
    inputs: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda text: None,
    may_change: Set[str] | None = None,
) -> dict[str, Any] | None:
    """Create or reopen a run of a stage, whose result depends on its section and some others.

    Args:
        run: its folder.
        config_yaml: the whole resolved configuration.
        stage: the section that is the run's own.
        sections: others that decide its result.
        inputs: hashes of what the run reads, by name; None where that is not known, or not needed.
        tell: is given what differs and may, in a line.
        may_change: dotted keys that may differ; None: those of the stage that may in any run.

    Returns:
        The result, where the run is finished; None where there is work to do.

    Raises:
        ConfigError: the run exists, and a setting that must not change has changed.
        DataError: the run has begun on other inputs.
    """
    now = parse_yaml(config_yaml, CONFIG)
    matters = {stage, *sections}
    if may_change is None:
        may_change = dotted(stage, MAY_CHANGE)
    if run.exists(CONFIG):
        before = parse_yaml(run.read_text(CONFIG), run.join(CONFIG))
        all_changed = differences(before, now)
        all_changed = {k: v for k, v in all_changed.items() if k.partition(".")[0] in matters}
        changed = {k: v for k, v in all_changed.items() if _owner(k) not in may_change}
        if changed:
            shown = _shown(changed)
            state = "is finished" if run.exists(RESULT) else "has begun"
            raise ConfigError(
                f"{run} {state} with other settings ({shown}); set them back, or choose another "
                "run.name"
            )
        if all_changed and not run.exists(RESULT):
            tell(f"goes on with other settings: {_shown(all_changed)}")
    if inputs is not None and run.exists(INPUTS):
        begun_on = run.read_json(INPUTS)
        for name, digest in inputs.items():
            if begun_on.get(name, digest) != digest:
                raise DataError(
                    f"{run} has begun on another {name} than is there now; put that one back, or "
                    "choose another run.name"
                )
    if run.exists(RESULT):
        result = run.read_json(RESULT)
        return result if isinstance(result, dict) else {}
    if inputs is not None and not run.exists(INPUTS):
        run.write_json(INPUTS, dict(inputs))
    run.write_text(CONFIG, config_yaml)
    return None


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())


def dotted(section: str, keys: Iterable[str]) -> set[str]:
    """Keys of a section, as a configuration's dotted ones."""
    return {f"{section}.{key}" for key in keys}


def _owner(key: str) -> str:
    """The setting that a dotted key is of: `finetune.workers.min` is of `finetune.workers`."""
    return ".".join(key.split(".")[:2])


class TrainingRun:
    """A run on this worker: to its end, or from evaluation to evaluation."""

    def __init__(
        self,
        job: TrainSpec,
        run: Folder,
        attempt: int,
        group: Group,
        feed: LoaderConfig,
        *,
        workers_here: int = 1,
        on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
        signals: ControlSignals = NO_SIGNALS,
    ) -> None:
        """Build the task and its loop.

        Args:
            job: what is trained.
            run: its folder.
            attempt: the attempt's number, under which this run may commit.
            group: the processes that train together.
            feed: where batches are made.
            workers_here: of the group, on this machine: they share its cores.
            on_progress: gets every logged record, on rank 0.
            signals: what others may want of the run.
        """
        config = job.config
        self._job, self._run, self._attempt, self._group = job, run, attempt, group
        self._threads = use_threads(config.threads, workers_here)
        if group.device.type == "cpu":
            keep_freed_memory()
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        self.task = job.make_task(group, feed)
        self._store = CheckpointStore(run, attempt, config.keep_checkpoints)
        self._digests = LineLog(run / DIGESTS, f"{attempt:04d}-{group.rank:04d}.txt", self._tell)
        self.loop = Loop(
            self.task,
            config,
            group,
            store=self._store,
            open_log=lambda step: MetricsLog(
                run,
                attempt,
                step,
                workers=group.world_size,
                weights=self.loop.loaded,
                tell=self._tell,
            ),
            on_progress=on_progress,
            signals=signals,
            on_batch=self._note if config.digests else None,
            before_save=self._digests.flush,
        )
        self.result: dict[str, Any] = {}  # once the run is over; of rank 0
        self._evaluations = self._go()

    def run(self) -> dict[str, Any]:
        """Train to the end; on rank 0 write the finished model, and return the result.

        Raises:
            StorageError: they could not be written, for minutes; says from where the run goes on.
            RaybertError: as `Loop.run`.
        """
        while self.advance() is not None:
            pass
        return self.result

    def advance(self) -> dict[str, Any] | None:
        """Train up to the next evaluation and return its record; None: the run is over.

        Raises:
            As `run`.
        """
        return next(self._evaluations, None)

    def close(self) -> None:
        """Leave the run as it stands; its checkpoints stay."""
        self._evaluations.close()

    def _tell(self, message: str) -> None:
        self.loop.tell(message)

    def _note(self, batch: Batch) -> None:
        self._digests.write(f"{batch.step} {batch.micro_batch_index} {batch.digest()}")

    def _go(self) -> Generator[dict[str, Any], None, None]:
        with closing(self._digests):
            outcome = yield from self.loop.evaluations()
        if self._group.rank == 0:
            patience = self._job.config.retry_timeout_s
            try:
                self.result = retry(lambda: self._finish(outcome), patience, self._tell)
            except StorageError as error:
                raise StorageError(f"{error}; {resume_hint(self._store.last)}") from None
        self._group.gather(None)  # nobody leaves before the result stands

    def _finish(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """Write the finished model and the result."""
        job, run = self._job, self._run
        check_attempt(run, self._attempt)  # the storage may have been away for minutes
        self.task.last = outcome  # the model's figures are those of the weights that it gets
        found = {
            **outcome,
            **job.finish(self.task, run),
            "tokens_per_second": _speed(outcome),
            "machine": describe_machine(
                self._group.device, workers=self._group.world_size, threads=self._threads
            ),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        result: dict[str, Any] = finite(found)
        check_attempt(run, self._attempt)  # again: the model may have taken minutes
        merge_metrics(run)
        run.write_json(RESULT, result)
        return result


def execute_bare(
    job: TrainSpec, run: Folder, *, on_progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train in this process, without Ray.

    Raises:
        KeyboardInterrupt: after Ctrl-C; a checkpoint of the last step is written, or, where the
            last step was already taken, the result.
    """
    device = torch.device("cuda" if _wants_gpu(job.config) else "cpu")
    attempt = begin_attempt(run, job.config.retry_timeout_s)
    group = Group(device=device)
    try:
        with _interruptible() as is_interrupted:
            result = TrainingRun(
                job,
                run,
                attempt,
                group,
                LoaderConfig(),
                on_progress=on_progress,
                signals=ControlSignals(stop=is_interrupted),
            ).run()
    except Stopped:
        raise KeyboardInterrupt from None
    if is_interrupted():
        raise KeyboardInterrupt
    return result


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C a wish to stop after a checkpoint; the second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # has no say over signals
        yield asked.is_set
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _wants_gpu(config: TrainConfig) -> bool:
    return config.gpu == "yes" or (config.gpu == "auto" and torch.cuda.is_available())


def _speed(outcome: Mapping[str, Any]) -> float:
    return round(float(outcome["tokens"]) / max(1e-9, float(outcome["seconds"])), 1)


def read_digests(run: Folder) -> dict[tuple[int, int], set[str]]:
    """The digests of every (step, micro-batch index); one each where attempts and ranks agree."""
    folder = run / DIGESTS
    found: dict[tuple[int, int], set[str]] = {}
    for name in folder.names():
        for line in folder.read_text(name).splitlines(keepends=True):
            if not line.endswith("\n"):  # of a worker that was killed while it wrote
                continue
            step, index, digest = line.split()
            found.setdefault((int(step), int(index)), set()).add(digest)
    return found
