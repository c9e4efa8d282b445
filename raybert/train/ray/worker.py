"""The worker function of Ray Train: an adapter around `TrainingRun`.

Checkpoints are raybert's own, in the run's storage: a restarted worker group finds the latest
complete one there, whatever Ray had registered.
"""

from __future__ import annotations

import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from raybert.cluster.internals.train import is_preempted
from raybert.errors import RaybertError, StorageError, Superseded
from raybert.records import Record
from raybert.storage.folder import Folder
from raybert.train.distributed import Group
from raybert.train.ray.driver_channel import DriverChannel, WorkerChannel
from raybert.train.ray.flight_recorder import FOLDER, keep_recordings
from raybert.train.ray.placement import operator_cpus
from raybert.train.ray.prometheus import PrometheusExporter
from raybert.train.run import TrainingRun
from raybert.train.run_folder import begin_attempt
from raybert.train.task import (
    ControlSignals,
    LoaderConfig,
    Preempted,
    ReplicasDiffer,
    Stopped,
    TrainSpec,
)

_RECORDED = "a collective timed out: `torchfrtrace {}` compares the last ones of all ranks"
_SEE = "a restart would fail alike; ray.logs=true or --bare shows where"


@dataclass(frozen=True, repr=False)  # Ray's page of training runs shows it: URIs may hold keys
class WorkerInputs:
    """What is sent to every worker."""

    spec: TrainSpec
    run: Folder
    gpu: bool
    data_memory: int  # bytes of masked rows that may wait for this worker
    channel: DriverChannel


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of a run's workers, from the latest checkpoint on.

    Permanent errors are sent to the driver; temporary ones are raised, so that Ray restarts the
    workers. `config` is `{"inputs": WorkerInputs}`.
    """
    import ray
    import ray.train

    from raybert.train.ray.failures import is_permanent

    inputs: WorkerInputs = config["inputs"]
    group = Group.current(
        torch.device("cuda", torch.cuda.current_device()) if inputs.gpu else torch.device("cpu"),
        inputs.spec.config.collective_timeout_s,
    )
    # Decided together: a worker that returned while another did not see it would be waited for.
    [is_over] = group.sum([inputs.channel.is_over()])
    if is_over:
        return  # a restart after a fatal error: the driver has the message
    is_first = group.rank == 0
    timing = inputs.spec.config
    attempt = group.first(
        lambda: begin_attempt(inputs.run, timing.retry_timeout_s), timing.collective_timeout_s
    )
    if is_first:
        inputs.channel.begin(attempt)
    if keep_recordings(inputs.run, attempt):
        kept = inputs.run / FOLDER / str(attempt - 1)
        inputs.channel.send_event("restart", _RECORDED.format(kept), 0)
    channel = WorkerChannel(inputs.channel, attempt) if is_first else None
    exporter = PrometheusExporter(inputs.run, attempt, group.world_size) if is_first else None
    signals = ControlSignals(preempt=is_preempted)
    if channel is not None:
        signals = ControlSignals(channel.is_stopping, is_preempted, channel.is_save_requested)

    def on_progress(record: Record) -> None:
        if channel is not None and exporter is not None:
            channel.report(record)
            exporter.report(record)

    try:
        free = int(ray.cluster_resources().get("CPU", 1)) - group.world_size  # as it is now
        cpus = operator_cpus(free, group.world_size, inputs.gpu)
        TrainingRun(
            inputs.spec,
            inputs.run,
            attempt,
            group,
            LoaderConfig(on_ray=True, cpus=cpus, memory=inputs.data_memory),
            workers_here=ray.train.get_context().get_local_world_size(),
            on_progress=on_progress,
            signals=signals,
        ).run()
    except Stopped:
        return
    except Superseded as error:
        if inputs.channel.attempt() == attempt:  # by another driver, not by this one's restart
            inputs.channel.fail(error)
    except (StorageError, Preempted, ReplicasDiffer):  # starts again from the last checkpoint
        raise
    except RaybertError as error:
        if channel is not None:
            channel.close()  # the records before the error are shown before it
        with suppress(Exception):  # Ray reports it, too
            inputs.channel.fail(error)
        raise
    except Exception as error:
        if is_permanent(error):
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
            traceback.print_exc()  # for the worker's log
            with suppress(Exception):
                inputs.channel.fail(RaybertError(f"training failed: {reason}; {_SEE}"))
        raise
    finally:
        if channel is not None:
            channel.close()
        if exporter is not None:
            exporter.close()
