"""Connecting to Ray: a cluster that is there, or one on this machine for the time of a command."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field

from raybert.cluster import token
from raybert.cluster.machine import cores
from raybert.config import Settings
from raybert.errors import UserError, one_line


class RayConfig(Settings):
    """Which Ray to use, and how much of this machine where it is started here."""

    address: str | None = Field(
        None, description="of a running cluster; null: RAY_ADDRESS, or one on this machine"
    )
    object_store_gb: float = Field(
        1.0, gt=0.1, description="shared memory of a Ray started here; a run needs little of it"
    )
    dashboard: bool = Field(
        False, description="Ray's web pages, for a Ray started here; they take 3% of a core"
    )
    logs: bool = Field(False, description="show what Ray and the workers print")


_PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
#: Fills the dashboard's page of training runs, from one more process that stays on the head.
_TRAIN_PAGE = "RAY_TRAIN_ENABLE_STATE_TRACKING"
#: For a Ray started here. Each of its processes wakes a hundred times a second, which takes 0.8% of
#: a core, and a trainer's threads wait for the slowest one of them: of idle workers one is enough.
_SPARING = {"num_workers_soft_limit": 1}
_CONNECT_SECONDS = 10  # for a cluster's head to take a connection

_started_here = False  # whether the connected Ray is one that `ray_session` started


@contextmanager
def environment(values: Mapping[str, str], *, overwrite: bool = False) -> Iterator[None]:
    """Set environment variables while the context lasts, then restore what was there.

    Variables that are already set keep their values unless `overwrite` is true.
    """
    new = {name: value for name, value in values.items() if overwrite or name not in os.environ}
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Resources:
    """What the connected cluster has in all."""

    cpus: float
    gpus: float
    object_store: int  # bytes
    started_here: bool  # for this process, and ends with it
    nodes: tuple[tuple[float, float], ...] = ()  # CPUs and GPUs of each node, where that matters


@contextmanager
def ray_session(config: RayConfig, workers: int = 1) -> Iterator[Resources]:
    """Connect to Ray, or start it here for as long as the context lasts.

    Started here, it gets a logical CPU for each worker and two more: workers occupy theirs for the
    whole run, and Ray Data's operators would starve on the rest of a small machine.

    Raises:
        UserError: nobody listens at the cluster's address, or who does doesn't answer, or wants
            another token.
    """
    global _started_here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own notice, answered
    # Ray gives its first process 20 s; on a machine with other work to do it takes longer.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    import ray
    from ray.exceptions import AuthenticationError

    address = config.address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if config.logs else logging.ERROR
    if ray.is_initialized():  # a pipeline's stages share one session
        yield _resources()
        return
    check_address(config)
    before = {name: os.environ.get(name) for name in (_PREEMPTION, _TRAIN_PAGE)}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address or config.dashboard:
        os.environ.setdefault(_TRAIN_PAGE, "1")
    try:
        if address:
            if token.is_asked_for(address):
                token.use_token()
                ray._raylet.Config.initialize("")  # it read the environment when it was imported
            ray.init(address, log_to_driver=config.logs, logging_level=level)
        else:
            # A machine that is its own cluster has no notice of its end that Ray could watch for.
            os.environ[_PREEMPTION] = "0"
            token.make_token()
            ray.init(
                "local",  # also where `ray start` has left word of a cluster on this machine
                num_cpus=max(cores(), workers) + 2,
                object_store_memory=int(config.object_store_gb * 1e9),
                include_dashboard=config.dashboard,
                _system_config=_SPARING,
                log_to_driver=config.logs,
                logging_level=level,
            )
    except AuthenticationError:
        raise UserError(token.refusal(f"the Ray cluster at {address}")) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise UserError(f"{where} does not start or answer: {one_line(error)}") from None
    token.close_token()
    if threading.current_thread() is threading.main_thread():  # Ray's own would just exit
        signal.signal(signal.SIGTERM, on_sigterm)
    _set_log_level(level)
    try:
        _started_here = not address
        if not config.logs:  # what nodes have to say of lost workers, a run says in its own words
            ray._private.worker.print_to_stdstream = lambda *message, **more: None
        if _started_here and not config.logs:  # what the monitor reads would be shown to nobody
            ray._private.worker._global_node.kill_log_monitor(check_alive=False)
        yield _resources()
    finally:
        _started_here = False
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_address(config: RayConfig) -> None:
    """Refuse a cluster's address where nobody listens: Ray tries for a minute, and tells all of it.

    Raises:
        UserError: nobody does.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or ""
    named = f"ray.address={address}" if config.address else f"RAY_ADDRESS={address}"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # which Ray has words for
        return
    if not host or port is None:  # auto, local, a namespace of Ray's client
        return
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            pass
    except OSError as error:
        other = "set it to null" if config.address else "unset it"
        raise UserError(
            f"{named}: nobody answers ({one_line(error)}); name the head of a cluster that runs, "
            f"or {other}, and a Ray is started on this machine"
        ) from None


def dashboard_url() -> str | None:
    """Where the connected Ray's web pages are; None where it has none."""
    import ray

    address = ray._private.worker.get_dashboard_url()
    return f"http://{address}/" if address else None


def logs_folder() -> Path | None:
    """Where the Ray that was started here writes its logs; None for one of somebody else's."""
    import ray

    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if _started_here and node is not None else None


def _set_log_level(level: int) -> None:
    """Quiet Ray's libraries; Ray Data sets its loggers up when it is first imported."""
    importlib.import_module("ray.data")
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)


def _resources() -> Resources:
    import ray

    total = ray.cluster_resources()
    return Resources(
        cpus=total.get("CPU", 1),
        gpus=total.get("GPU", 0),
        object_store=int(total.get("object_store_memory", 1 << 30)),
        started_here=_started_here,
        nodes=tuple(
            (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
            for node in ray.nodes()
            if node["Alive"]
        ),
    )
