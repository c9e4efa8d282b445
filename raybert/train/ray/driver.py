"""Train on a Ray cluster: start the workers, show their progress, report their errors.

`failure_policy` decides what happens when a worker is lost, `scaling_policy` how many there are;
`worker` is what each of them runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from raybert.cluster.internals.private_names import has_private_api
from raybert.cluster.internals.train import controller_environment
from raybert.cluster.machine import KEEP_FREED_MEMORY
from raybert.cluster.session import Resources, environment
from raybert.errors import RaybertError, StorageError
from raybert.storage.folder import Folder
from raybert.storage.retry import retry
from raybert.train.control import Stopped
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.fit_thread import run_fit
from raybert.train.ray.placement import check_resources, uses_gpus
from raybert.train.ray.worker import WorkerInputs, train_worker
from raybert.train.run_folder import RESULT
from raybert.train.settings import TrainConfig
from raybert.train.task import TrainSpec

#: Bytes of masked rows that may wait for a worker. A GPU reads 8 MB/s and more, and half a minute
#: of them rides out a slow storage. On a CPU the operators share the processors with the training,
#: and what they make ahead slows the first steps, by which a run of minutes is measured.
_LOOK_AHEAD = {"gpu": 256 << 20, "cpu": 64 << 20}
_RESIZE_SECONDS = 30.0  # between two checks whether there is room for more workers
_SILENCE_SECONDS = 120  # without an answer of Ray's head, which may come back


def train_on_ray(
    job: TrainSpec,
    run: Folder,
    resources: Resources,
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
    channel: DriverChannel | None = None,
) -> dict[str, Any]:
    """Train on the connected Ray cluster, in the folder `run`, and return the result.

    `on_progress` gets every logged record; others may ask the workers to stop through `channel`.

    Raises:
        Stopped: the workers were asked to stop, and their state is in a checkpoint.
        UserError: what the user can mend, wherever it was found.
        RaybertError: training failed more often than `max_failures` allows; quotes the first
            failing worker.
    """
    config = job.config
    gpu = uses_gpus(config, resources.gpus)
    check_resources(config, gpu, resources)
    channel = channel or DriverChannel()
    ahead = _LOOK_AHEAD["gpu" if gpu else "cpu"]
    memory = int(min(ahead, resources.object_store / 2 / config.max_workers))
    inputs = WorkerInputs(job, run, gpu, memory, channel)
    names = run.path.rstrip("/").split("/")[-2:]  # experiment and stage, for Ray's pages
    ray_folder, name = run / "ray", "-".join([*names, str(time.time_ns())])
    trainer = _make_trainer(inputs, resources, ray_folder, name)
    variables = controller_environment(
        config.collective_timeout_s, is_elastic=not isinstance(config.workers, int)
    )
    with environment(variables):
        _fit(trainer.fit, channel, on_progress)
    with suppress(StorageError):  # leftovers are no failure
        ray_folder.delete(name)
        if not ray_folder.names(hidden=True):  # another driver's attempt may be running there
            run.delete("ray")
    if not retry(lambda: run.exists(RESULT), config.retry_timeout_s):
        raise Stopped(f"{run} was asked to stop; run it again to go on")
    result = retry(lambda: run.read_json(RESULT), config.retry_timeout_s)
    return result if isinstance(result, dict) else {}


def _make_trainer(inputs: WorkerInputs, resources: Resources, ray_folder: Folder, name: str) -> Any:
    """A TorchTrainer with our policies, or with Ray's own if this Ray does not take ours."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchTrainer

    from raybert.train.ray.torch_backend import NodeInterfaceConfig

    config, gpu = inputs.job.config, inputs.gpu
    scaling = _scaling_config(config, gpu)
    failures = FailureConfig(max_failures=config.max_failures)
    options: dict[str, Any] = {
        "train_loop_config": {"inputs": inputs},
        "torch_config": NodeInterfaceConfig(
            backend="nccl" if gpu else "gloo", timeout_s=math.ceil(config.collective_timeout_s)
        ),
        "scaling_config": scaling,
        "run_config": RunConfig(
            name=name,
            storage_path=ray_folder.path,
            storage_filesystem=ray_folder.filesystem,
            failure_config=failures,
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": {} if gpu else KEEP_FREED_MEMORY},
        ),
    }
    if not has_private_api("train"):
        return TorchTrainer(train_worker, **options)
    from raybert.cluster.internals.train_controller import PolicyTrainer
    from raybert.train.ray.failure_policy import FailureContext, NoProgressFailurePolicy
    from raybert.train.ray.scaling_policy import ElasticPolicy

    context = FailureContext(inputs.run, inputs.channel)
    return PolicyTrainer(
        train_worker,
        failure_policy=NoProgressFailurePolicy(failures, context),
        scaling_policy=ElasticPolicy(scaling, context) if scaling.elasticity_enabled else None,
        needs_cleaner=not resources.started_here,
        **options,
    )


def _scaling_config(config: TrainConfig, gpu: bool) -> Any:
    from ray.train import ScalingConfig

    fewest, most = config.min_workers, config.max_workers
    return ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),
        elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        use_gpu=gpu,
        # CPU workers share a node's caches and memory, GPUs its fast links.
        placement_strategy="PACK" if gpu else "SPREAD",
        resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
    )


def _fit(
    fit: Callable[[], Any], channel: DriverChannel, on_progress: Callable[[dict[str, Any]], None]
) -> None:
    """Run `fit` and hand the workers' records to `on_progress` until it returns.

    Raises what `run_fit` does, StorageError where Ray can't write its own files in the run's
    folder, and the first failing worker's error.
    """
    from ray.train import TrainingFailedError

    from raybert.train.ray.failures import to_user_error

    error = run_fit(fit, channel, _ProgressReader(channel, on_progress).poll)
    if isinstance(error, TrainingFailedError):
        raise to_user_error(error) from None
    if isinstance(error, OSError):
        raise StorageError(f"Ray can't write to the run's storage: {error}") from None
    if error is not None:
        raise error


class _ProgressReader:
    """Reads the workers' records and fatal errors from their channel."""

    def __init__(
        self, channel: DriverChannel, on_progress: Callable[[dict[str, Any]], None]
    ) -> None:
        self._channel, self._on_progress = channel, on_progress
        self._last_answer = time.monotonic()

    def poll(self) -> None:
        """Pass on the records since the last call; raise the fatal error that a worker reported.

        RaybertError: Ray's head has not answered for two minutes.
        """
        from ray.exceptions import RpcError

        try:
            fatal = self._channel.error()  # read before the records, which were written before it
            for record in self._channel.receive():
                self._on_progress(record)
        except RpcError as error:
            if time.monotonic() - self._last_answer > _SILENCE_SECONDS:
                raise RaybertError(f"Ray's head does not answer: {error}") from None
            return
        self._last_answer = time.monotonic()
        if fatal is not None:  # Ray would only repeat the failure
            raise fatal
