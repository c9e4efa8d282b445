"""Ray Train: the same training on many workers, restarted where one is lost.

The worker function is an adapter around `Execution`. Checkpoints are raybert's own, in the run's
storage: a restarted worker group finds the youngest whole one there, whatever Ray had registered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from raybert.cluster.allocator import KEEP_FREED_MEMORY
from raybert.cluster.session import Resources, environment
from raybert.errors import (
    ConfigError,
    DamagedError,
    RaybertError,
    StorageError,
    Superseded,
    UserError,
)
from raybert.storage.folder import Folder, retry
from raybert.train.checkpoint import begin_attempt
from raybert.train.distributed import Group
from raybert.train.ray.driver_channel import DriverChannel, WorkerChannel
from raybert.train.ray.fit_thread import run_fit
from raybert.train.ray.prometheus import Telemetry
from raybert.train.run import RESULT, LoaderConfig, TrainingRun, TrainSpec
from raybert.train.settings import TrainConfig
from raybert.train.task import ControlSignals, Preempted, Stopped

#: Bytes of masked rows that may wait for a worker. A GPU reads 8 MB/s and more, and half a minute
#: of them rides out a slow storage. On a CPU the operators share the processors with the training,
#: and what they make ahead slows the steps at the start, by which a run of minutes is measured.
_LOOK_AHEAD = {"gpu": 256 << 20, "cpu": 64 << 20}
_RESIZE_SECONDS = 30.0  # between two looks whether there is room for more workers
_SILENCE_SECONDS = 120  # without an answer of Ray's head: it may come back


@dataclass(frozen=True, repr=False)  # Ray's page of training runs shows it: URIs may hold keys
class _Work:
    """What travels to every worker."""

    job: TrainSpec
    run: Folder
    gpu: bool
    data_memory: int
    board: DriverChannel


def train_on_ray(
    job: TrainSpec,
    run: Folder,
    resources: Resources,
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
    board: DriverChannel | None = None,
) -> dict[str, Any]:
    """Train on the connected Ray cluster and return the result.

    Args:
        job: what is trained.
        run: its folder.
        resources: what the cluster has.
        on_progress: gets every logged record.
        board: by which others may ask the workers to stop; None: nobody does.

    Raises:
        Stopped: the workers were asked to stop, and their state is in a checkpoint.
        UserError: what the user can mend, wherever it was found.
        RaybertError: training failed more often than `max_failures` allows; says what the first
            failing worker said.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from raybert.train.ray.recovery import NodesInterface, RestartingTrainer

    config = job.config
    gpu = uses_gpus(config, resources.gpus)
    check_resources(config, gpu, resources)
    board = board or DriverChannel()
    work = _Work(
        job=job,
        run=run,
        gpu=gpu,
        data_memory=int(
            min(
                _LOOK_AHEAD["gpu" if gpu else "cpu"],
                resources.object_store / 2 / config.max_workers,
            )
        ),
        board=board,
    )
    names = run.path.rstrip("/").split("/")[-2:]  # experiment and stage, for Ray's pages
    ray_folder, name = run / "ray", "-".join([*names, str(time.time_ns())])
    fewest, most = config.min_workers, config.max_workers
    trainer = RestartingTrainer(
        _worker,
        run=run,
        board=board,
        resources=resources,
        train_loop_config={"work": work},
        torch_config=NodesInterface(
            backend="nccl" if gpu else "gloo", timeout_s=math.ceil(config.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=gpu,
            # CPU workers share a node's caches and memory, GPUs its fast links.
            placement_strategy="PACK" if gpu else "SPREAD",
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=ray_folder.path,
            storage_filesystem=ray_folder.filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": {} if gpu else KEEP_FREED_MEMORY},
        ),
    )
    with environment(_patience(config)):
        _fit(trainer.fit, board, on_progress)
    with suppress(StorageError):  # what is left over is no reason to fail
        ray_folder.delete(name)
        if not ray_folder.names(hidden=True):  # another driver's attempt may be at work there
            run.delete("ray")
    if not retry(lambda: run.exists(RESULT), config.retry_timeout_s):
        raise Stopped(f"{run} was asked to stop; run it again to go on")
    result = retry(lambda: run.read_json(RESULT), config.retry_timeout_s)
    return result if isinstance(result, dict) else {}


def _patience(config: TrainConfig) -> dict[str, str]:
    """How soon Ray Train takes a worker for lost: its own ten minutes are for GPUs that compile.

    And how long it waits for the place of one that a range of workers may do without: a node that
    has just died is on Ray's list for some seconds yet.
    """
    place = (
        {} if isinstance(config.workers, int) else {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    )
    return place | {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(math.ceil(config.collective_timeout_s)),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",
    }


def operator_cpus(free: int, workers: int, gpu: bool) -> float:
    """The logical CPUs of each worker's masking, so that all workers' fit beside each other.

    Every worker drives a Ray Data execution of its own. An operator that waits for its rows to be
    taken keeps its CPU, and a worker whose operator finds none waits for ever, and with it, in the
    next all-reduce, all others: where CPUs are few, operators share them, whichever nodes they are
    on. One operator masks far more than a CPU trains on; a second one hides a GPU's slow reads.
    """
    if free >= workers:
        return min(2 if gpu else 1, free // workers)
    return 1 / math.ceil(workers / max(1, free))


def uses_gpus(config: TrainConfig, gpus: float) -> bool:
    """Whether each worker gets a GPU, in a cluster that has so many."""
    return config.gpu == "yes" or (config.gpu == "auto" and gpus >= config.min_workers)


def check_resources(config: TrainConfig, gpu: bool, resources: Resources) -> None:
    """Refuse what would wait for ever: workers without a place, operators without a CPU.

    A range of workers waits on purpose, for nodes that an autoscaler brings.

    Raises:
        ConfigError: the cluster is too small.
    """
    if not isinstance(config.workers, int) and not resources.started_here:
        return
    workers, name = config.min_workers, f"{config.section}.workers"
    name += "" if isinstance(config.workers, int) else ".min"
    key = f"{name}={workers}"
    if gpu and resources.gpus < workers:
        raise ConfigError(
            f"{key} with {config.section}.gpu={config.gpu} need {workers} GPUs, the cluster has "
            f"{resources.gpus:g}; lower {name} or set {config.section}.gpu=no"
        )
    if resources.cpus < workers + 1:
        raise ConfigError(
            f"{key} leave no CPU for Ray Data's operators: the cluster has "
            f"{resources.cpus:g}; lower it to {max(1, int(resources.cpus) - 1)} or add a node"
        )


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    work: _Work = config["work"]
    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if work.gpu else torch.device("cpu")
    group = Group.current(device)
    # Together: a worker that ended while another just missed the word would be waited for.
    [over] = group.sum([work.board.is_over()])
    if over:
        return  # a restart can't mend what went wrong: end in peace, the driver has the message
    patience = work.job.config.retry_timeout_s
    attempt = begin_attempt(work.run, patience) if group.rank == 0 else 0
    attempt = int(group.sum([attempt])[0])
    if group.rank == 0:
        work.board.begin(attempt)
    link = WorkerChannel(work.board, attempt) if group.rank == 0 else None
    telemetry = Telemetry(work.run, attempt, group.world_size) if group.rank == 0 else None

    def on_progress(record: dict[str, Any]) -> None:
        if link is not None and telemetry is not None:
            link.report(record)
            telemetry.report(record)

    try:
        TrainingRun(
            work.job,
            work.run,
            attempt,
            group,
            LoaderConfig(
                on_ray=True, cpus=_data_cpus(group.world_size, work.gpu), memory=work.data_memory
            ),
            workers_here=context.get_local_world_size(),
            on_progress=on_progress,
            signals=ControlSignals(link.is_stopping, _is_leaving, link.is_asked_to_save)
            if link
            else ControlSignals(preempt=_is_leaving),
        ).run()
    except Stopped:
        return  # as asked
    except Superseded as error:
        if work.board.attempt() == attempt:  # by another driver, else by a restart of this one's
            work.board.fail(error)
    except (StorageError, Preempted):
        raise  # may pass: Ray starts the workers again
    except RaybertError as error:
        if link is not None:
            link.close()  # what came before the error is shown before it
        with suppress(Exception):  # Ray hands it on, too
            work.board.fail(error)
        raise
    finally:
        if link is not None:
            link.close()
        if telemetry is not None:
            telemetry.close()


def _data_cpus(workers: int, gpu: bool) -> float:
    """The CPUs of this worker's operators, on the cluster as it is now."""
    import ray

    return operator_cpus(int(ray.cluster_resources().get("CPU", 1)) - workers, workers, gpu)


def _is_leaving() -> bool:
    """Whether Ray has word that a worker's node will be taken away.

    `ray.train.get_preemption_info` is a barrier of all workers; the loop sums this up by itself.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _fit(
    fit: Callable[[], Any], board: DriverChannel, on_progress: Callable[[dict[str, Any]], None]
) -> None:
    """Run `fit` and hand the workers' records to `on_progress` until it returns.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the workers have saved a checkpoint.
        StorageError: Ray can't write its own files in the run's folder.
        RaybertError: what the first failing worker raised.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    error = run_fit(fit, board, _ProgressReader(board, on_progress).poll)
    if isinstance(error, TrainingFailedError):
        raise _said_by_worker(error) from None
    if isinstance(error, OSError):
        raise StorageError(f"Ray can't write to the run's storage: {error}") from None
    if error is not None:
        raise error


class _ProgressReader:
    """Reads the workers' records and fatal errors from their channel."""

    def __init__(self, board: DriverChannel, on_progress: Callable[[dict[str, Any]], None]) -> None:
        self._board, self._on_progress = board, on_progress
        self._last_answer = time.monotonic()

    def poll(self) -> None:
        """Pass on the records since the last call.

        Raises:
            RaybertError: Ray's head has not answered for two minutes.
            Exception: the fatal error that a worker reported.
        """
        from ray.exceptions import RpcError

        try:
            fatal = self._board.error()  # read before the records, which were written before it
            for record in self._board.take():
                self._on_progress(record)
        except RpcError as error:
            if time.monotonic() - self._last_answer > _SILENCE_SECONDS:
                raise RaybertError(f"Ray's head does not answer: {error}") from None
            return
        self._last_answer = time.monotonic()
        if fatal is not None:  # Ray would only repeat the failure
            raise fatal


def _said_by_worker(error: Any) -> Exception:
    """What the first failing worker said, in one line."""
    from raybert.train.ray.recovery import causes_of, reason_of

    cause = causes_of(error)[0]
    if isinstance(cause, UserError | StorageError | DamagedError):
        return cause
    return RaybertError(f"training failed: {reason_of(error)}")
