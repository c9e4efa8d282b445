"""Train on a Ray cluster: start the workers, show their progress, report their errors.

`worker` is what each of them runs; `recovery` says what happens when one is lost.
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
from raybert.records import OnRecord, ignore_record
from raybert.storage.folder import Folder
from raybert.storage.retry import retry
from raybert.train.ray.driver_channel import DriverChannel, run_fit
from raybert.train.ray.flight_recorder import recorder_environment
from raybert.train.ray.placement import check_resources, format_shortage, uses_gpus
from raybert.train.ray.worker import WorkerInputs, train_worker
from raybert.train.run_folder import RESULT
from raybert.train.settings import TrainConfig
from raybert.train.task import Stopped, TrainSpec

#: Bytes of masked rows that may wait for a worker. A GPU reads 8 MB/s and more; 30 s of rows hide a
#: slow storage. On a CPU the operators share the cores with training, and filling a large buffer
#: slows the first steps, by which a time-limited run measures its speed.
_LOOK_AHEAD = {"gpu": 256 << 20, "cpu": 64 << 20}
_RESIZE_SECONDS = 30.0  # between two checks whether there is room for more workers
_WAIT_SECONDS = 10.0  # for workers to be placed, before a run says what it waits for
_REPORT_SECONDS = 30.0  # between two such lines
_HEAD_TIMEOUT_S = 120  # without an answer of Ray's head, which may come back


def train_on_ray(
    spec: TrainSpec,
    run: Folder,
    resources: Resources,
    *,
    on_progress: OnRecord = ignore_record,
    channel: DriverChannel | None = None,
) -> dict[str, Any]:
    """Train on the connected Ray cluster, in the folder `run`, and return the result.

    `on_progress` gets every logged record; others may ask the workers to stop through `channel`.

    Raises:
        Stopped: the workers were asked to stop, and their state is in a checkpoint.
        UserError: what the user can fix, wherever it was found.
        RaybertError: training failed more often than `max_failures` allows.
    """
    config = spec.config
    gpu = uses_gpus(config, resources.gpus)
    check_resources(config, gpu, resources)
    channel = channel or DriverChannel()
    ahead = _LOOK_AHEAD["gpu" if gpu else "cpu"]
    memory = int(min(ahead, resources.object_store / 2 / config.max_workers))
    inputs = WorkerInputs(spec, run, gpu, memory, channel)
    names = run.path.rstrip("/").split("/")[-2:]  # experiment and stage, for Ray's pages
    ray_folder, name = run / "ray", "-".join([*names, str(time.time_ns())])
    trainer = _make_trainer(inputs, resources, ray_folder, name)
    variables = controller_environment(
        config.collective_timeout_s, is_elastic=not isinstance(config.workers, int)
    )
    wait = _Wait(config, gpu, channel, on_progress)
    with environment(variables):
        _fit(trainer.fit, channel, on_progress, wait.report)
    with suppress(StorageError):  # leftovers are no failure
        ray_folder.delete(name)
        if not ray_folder.names(hidden=True):  # another driver's attempt may be running there
            run.delete("ray")
    if not retry(lambda: run.exists(RESULT), config.retry_timeout_s):
        raise Stopped(f"{run} was asked to stop; run it again to resume")
    return dict(retry(lambda: run.read_json(RESULT), config.retry_timeout_s))


def _make_trainer(inputs: WorkerInputs, resources: Resources, ray_folder: Folder, name: str) -> Any:
    """A TorchTrainer with our policies, or with Ray's own if this Ray does not take ours."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raybert.train.ray.torch_backend import NodeInterfaceConfig

    config, gpu = inputs.spec.config, inputs.gpu
    fewest, most = config.min_workers, config.max_workers
    scaling = ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),
        elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        use_gpu=gpu,
        # CPU workers share a node's caches and memory, GPUs its fast links.
        placement_strategy="PACK" if gpu else "SPREAD",
        resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
    )
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
            worker_runtime_env={
                "env_vars": recorder_environment(name) if gpu else KEEP_FREED_MEMORY
            },
        ),
    }
    if not has_private_api("train"):
        return TorchTrainer(train_worker, **options)
    from raybert.cluster.internals.train_controller import PolicyTrainer
    from raybert.train.ray.recovery import ElasticPolicy, FailureContext, NoProgressFailurePolicy

    context = FailureContext(inputs.run, inputs.channel)
    rows = inputs.spec.order_micro_batch_size or config.micro_batch_size
    elastic = ElasticPolicy(scaling, context, config.global_batch_size // rows)
    return PolicyTrainer(
        train_worker,
        failure_policy=NoProgressFailurePolicy(failures, context),
        scaling_policy=elastic if scaling.elasticity_enabled else None,
        needs_cleaner=not resources.started_here,
        **options,
    )


class _Wait:
    """Reports what a run that has not begun waits for."""

    def __init__(
        self, config: TrainConfig, gpu: bool, channel: DriverChannel, on_progress: OnRecord
    ) -> None:
        self._config, self._gpu = config, gpu
        self._channel, self._on_progress = channel, on_progress
        self._next = time.monotonic() + _WAIT_SECONDS
        self._others = set(_placed_groups())

    def report(self) -> None:
        """Report what is missing, every half a minute, until the workers have been placed."""
        if self._next == math.inf or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _REPORT_SECONDS
        if self._channel.has_progress or self._channel.attempt():
            self._next = math.inf
            return
        placed = [
            bundles for group, bundles in _placed_groups().items() if group not in self._others
        ]
        if max(placed, default=0) >= self._config.min_workers:  # the workers import and connect
            return
        import ray

        total, free = ray.cluster_resources(), ray.available_resources()
        shortage = format_shortage(self._config, self._gpu, total, free)
        if shortage is not None:
            self._on_progress({"kind": "event", "step": 0, "event": "waiting", "message": shortage})


def _placed_groups() -> dict[str, int]:
    """The placement groups that have their resources, and how many workers each has room for."""
    from ray.util import placement_group_table

    return {
        group: len(found["bundles"])
        for group, found in placement_group_table().items()
        if found["state"] == "CREATED"
    }


def _fit(
    fit: Callable[[], Any],
    channel: DriverChannel,
    on_progress: OnRecord,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `fit` and hand the workers' records to `on_progress` until it returns.

    `on_poll` is called twice a second.

    Raises what `run_fit` does, the first failing worker's error, StorageError where Ray can't write
    its own files in the run's folder, and RaybertError where Ray's head does not answer.
    """
    from ray.exceptions import RpcError
    from ray.train import TrainingFailedError

    from raybert.train.ray.failures import to_user_error

    last_answer = time.monotonic()

    def poll() -> None:
        nonlocal last_answer
        try:
            fatal = channel.error()  # read before the records, which were written before it
            for record in channel.receive():
                on_progress(record)
            on_poll()
        except RpcError as error:
            if time.monotonic() - last_answer > _HEAD_TIMEOUT_S:
                raise RaybertError(f"Ray's head does not answer: {error}") from None
            return
        last_answer = time.monotonic()
        if fatal is not None:  # Ray would only repeat the failure
            raise fatal

    error = run_fit(fit, channel, poll)
    if isinstance(error, TrainingFailedError):
        raise to_user_error(error) from None
    if isinstance(error, OSError):
        raise StorageError(f"Ray can't write to the run's storage: {error}") from None
    if error is not None:
        raise error
