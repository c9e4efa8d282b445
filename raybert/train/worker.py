"""Ray Train: the same training on many workers, restarted where one is lost.

The worker function is an adapter around `execute`. Checkpoints are raybert's own, in the run's
storage: a restarted worker group finds the youngest whole one there, whatever Ray had registered.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raybert.errors import ConfigError, RaybertError, StorageError, Superseded, UserError
from raybert.model.allocator import KEEP_FREED_MEMORY
from raybert.ray_session import Resources
from raybert.storage import Folder
from raybert.train.checkpoint import begin_attempt
from raybert.train.group import Group
from raybert.train.loop import Stopped
from raybert.train.run import RESULT, Feed, Job, execute

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60  # for the step under way and its checkpoint, after Ctrl-C


class Board:
    """An actor between driver and workers: progress, the first fatal error, the wish to stop."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._error: Exception | None = None
        self._stopping = False

    def put(self, record: dict[str, Any]) -> None:
        """Add a record of progress."""
        self._records.append(record)

    def take(self) -> tuple[list[dict[str, Any]], Exception | None]:
        """Return the records since the last call, and the fatal error if there is one."""
        records, self._records = self._records, []
        return records, self._error

    def fail(self, error: Exception) -> None:
        """Report an error that no restart mends; the first one stays."""
        self._error = self._error or error

    def stop(self) -> None:
        """Ask the workers to stop after a checkpoint."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether the workers should stop."""
        return self._stopping

    def is_over(self) -> bool:
        """Whether there is nothing to do for a worker that starts now."""
        return self._stopping or self._error is not None


@dataclass(frozen=True)
class _Work:
    """What travels to every worker."""

    job: Job
    run: Folder
    gpu: bool
    data_cpus: float
    data_memory: int
    board: Any  # the Board's actor handle


def train_on_ray(
    job: Job,
    run: Folder,
    resources: Resources,
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Train on the connected Ray cluster and return the result.

    Raises:
        UserError: what the user can mend, wherever it was found.
        RaybertError: training failed more often than `max_failures` allows; says what the first
            failing worker said.
    """
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = job.config
    gpu = config.gpu == "yes" or (config.gpu == "auto" and resources.gpus >= config.workers)
    _check_resources(config.workers, gpu, resources)
    board = ray.remote(num_cpus=0)(Board).remote()
    work = _Work(
        job=job,
        run=run,
        gpu=gpu,
        # Every worker drives a Ray Data execution of its own: none may think it owns the cluster.
        data_cpus=max(1.0, math.floor((resources.cpus - config.workers) / config.workers)),
        data_memory=int(min(256 << 20, resources.object_store / 2 / config.workers)),
        board=board,
    )
    ray_folder = run / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"work": work},
        torch_config=TorchConfig(
            backend="nccl" if gpu else "gloo", timeout_s=math.ceil(config.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name=f"attempt-{int(time.time())}",
            storage_path=ray_folder.path,
            storage_filesystem=ray_folder.filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": {} if gpu else KEEP_FREED_MEMORY},
        ),
    )
    _Fit(trainer, board, on_progress).wait()
    run.delete("ray")
    result = run.read_json(RESULT)
    return result if isinstance(result, dict) else {}


def _check_resources(workers: int, gpu: bool, resources: Resources) -> None:
    """Refuse what would wait for ever: workers without a place, operators without a CPU.

    Raises:
        ConfigError: the cluster is too small.
    """
    if gpu and resources.gpus < workers:
        raise ConfigError(
            f"workers={workers} with gpu=yes need {workers} GPUs, the cluster has "
            f"{resources.gpus:g}; lower workers or set gpu: no"
        )
    if resources.cpus < workers + 1:
        raise ConfigError(
            f"workers={workers} leave no CPU for Ray Data's operators: the cluster has "
            f"{resources.cpus:g}; lower workers to {max(1, int(resources.cpus) - 1)} or add a node"
        )


def _worker(config: dict[str, Any]) -> None:
    import ray
    import ray.train

    work: _Work = config["work"]
    if ray.get(work.board.is_over.remote()):
        return  # a restart can't mend what went wrong: end in peace, the driver has the message
    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if work.gpu else torch.device("cpu")
    group = Group.current(device)
    attempt = begin_attempt(work.run) if group.rank == 0 else 0
    attempt = int(group.sum([attempt])[0])
    link = _Link(work.board) if group.rank == 0 else None
    try:
        execute(
            work.job,
            work.run,
            attempt,
            group,
            Feed(on_ray=True, cpus=work.data_cpus, memory=work.data_memory),
            workers_here=context.get_local_world_size(),
            on_progress=link.report if link else lambda record: None,
            should_stop=link.is_stopping if link else lambda: False,
        )
    except (Stopped, Superseded):
        return  # the one was asked for; in the other's place a younger attempt is at work
    except StorageError:
        raise  # may pass: Ray starts the workers again
    except RaybertError as error:
        ray.get(work.board.fail.remote(error))
        raise


class _Link:
    """Rank 0's link to the board. Neither way costs a step any time."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._stopping = threading.Event()
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def report(self, record: dict[str, Any]) -> None:
        self._board.put.remote(record)

    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def _listen(self) -> None:
        import ray

        while not ray.get(self._board.is_stopping.remote()):
            time.sleep(_POLL_SECONDS)
        self._stopping.set()


class _Fit:
    """Runs `fit` in a thread, while the main thread shows progress and listens to Ctrl-C.

    In the main thread `fit` would install a handler of its own for Ctrl-C, which kills the workers
    without a checkpoint, ends the process with 0, and stays installed.
    """

    def __init__(
        self, trainer: Any, board: Any, on_progress: Callable[[dict[str, Any]], None]
    ) -> None:
        self._trainer, self._board, self._on_progress = trainer, board, on_progress
        self._error: Exception | None = None
        # An event, for a `join` that Ctrl-C interrupts takes the thread for ended (CPython 3.11).
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._fit, name="fit", daemon=True)

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint of the last step is written.
            RaybertError: what the first failing worker said.
        """
        from ray.train.v2.api.exceptions import TrainingFailedError

        self._thread.start()
        try:
            self._watch()
        except KeyboardInterrupt:
            self._board.stop.remote()
            self._over.wait(_GRACE_SECONDS)  # a second Ctrl-C ends this, too
            raise
        if isinstance(self._error, TrainingFailedError):
            raise _said_by_worker(self._error) from None
        if self._error is not None:
            raise self._error

    def _watch(self) -> None:
        import ray

        over = False
        while not over:
            over = self._over.wait(_POLL_SECONDS)
            records, fatal = ray.get(self._board.take.remote())
            for record in records:
                self._on_progress(record)
            if fatal is not None:  # no use in waiting until Ray has tried again
                raise fatal

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # raised by `wait`, in the main thread
            self._error = error
        finally:
            self._over.set()


def _said_by_worker(error: Any) -> Exception:
    """What the first failing worker said, in one line."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return RaybertError(f"training failed: {str(error).strip().splitlines()[-1]}")
    rank, failure = min(failures.items())
    cause = getattr(failure, "cause", None) or failure
    if isinstance(cause, UserError):
        return cause
    last = (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
    return RaybertError(f"training failed: worker {rank}: {last}")
