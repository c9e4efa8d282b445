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

from raybert.errors import RaybertError, UserError
from raybert.ray_session import Resources
from raybert.storage import Folder
from raybert.train.checkpoint import begin_attempt
from raybert.train.group import Group
from raybert.train.run import RESULT, Feed, Job, execute

_POLL_SECONDS = 0.5


class Board:
    """An actor that workers write to and the driver reads: progress, and the first fatal error."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._error: Exception | None = None

    def put(self, record: dict[str, Any]) -> None:
        """Add a record of progress."""
        self._records.append(record)

    def fail(self, error: Exception) -> None:
        """Report an error that no restart mends; the first one stays."""
        self._error = self._error or error

    def error(self) -> Exception | None:
        """The error that was reported."""
        return self._error

    def take(self) -> list[dict[str, Any]]:
        """Return the records since the last call."""
        records, self._records = self._records, []
        return records


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
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = job.config
    gpu = config.gpu == "yes" or (config.gpu == "auto" and resources.gpus >= config.workers)
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
        ),
    )
    watcher = _Watcher(board, on_progress)
    with watcher:
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise watcher.error() or _said_by_worker(error) from None
    fatal = watcher.error()
    if fatal is not None:
        raise fatal
    run.delete("ray")
    result = run.read_json(RESULT)
    return result if isinstance(result, dict) else {}


def _worker(config: dict[str, Any]) -> None:
    import ray
    import ray.train

    work: _Work = config["work"]
    if ray.get(work.board.error.remote()) is not None:
        return  # a restart can't mend it: end in peace, the driver has the message
    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if work.gpu else torch.device("cpu")
    group = Group.current(device)
    attempt = begin_attempt(work.run) if group.rank == 0 else 0
    attempt = int(group.sum([attempt])[0])
    reporter = _Reporter(work.board) if group.rank == 0 else None
    try:
        execute(
            work.job,
            work.run,
            attempt,
            group,
            Feed(on_ray=True, cpus=work.data_cpus, memory=work.data_memory),
            workers_here=context.get_local_world_size(),
            on_progress=reporter or (lambda record: None),
        )
    except RaybertError as error:
        ray.get(work.board.fail.remote(error))
        raise


class _Reporter:
    """Sends records to the board without waiting for it."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def __call__(self, record: dict[str, Any]) -> None:
        self._board.put.remote(record)


class _Watcher:
    """Reads the board while `fit` blocks the driver's main thread."""

    def __init__(self, board: Any, on_progress: Callable[[dict[str, Any]], None]) -> None:
        self._board, self._on_progress = board, on_progress
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def error(self) -> Exception | None:
        """The fatal error that a worker reported."""
        import ray

        error: Exception | None = ray.get(self._board.error.remote())
        return error

    def _watch(self) -> None:
        import ray

        while True:
            done = self._done.wait(_POLL_SECONDS)
            for record in ray.get(self._board.take.remote()):
                self._on_progress(record)
            if done:
                return


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
