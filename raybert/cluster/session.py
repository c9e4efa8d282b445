"""Connecting to Ray: a running cluster, or one on this machine for as long as a command runs."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from raybert.cluster import token
from raybert.cluster.internals import core
from raybert.cluster.internals import train as ray_train
from raybert.cluster.machine import cores
from raybert.cluster.scratch import scratch_folder
from raybert.config import Settings
from raybert.errors import UserError, one_line


class RayConfig(Settings):
    """Which Ray to use, and how much of this machine it gets where it is started here."""

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


_SECRETS = ("RAYBERT_API_KEYS",)  # variables that no process of Ray needs
_CONNECT_SECONDS = 10  # for a cluster's head to accept a connection

_started_here = False  # whether `ray_session` started the connected Ray
_context: Any = None  # what `ray.init` returned


@contextmanager
def environment(values: Mapping[str, str], *, overwrite: bool = False) -> Iterator[None]:
    """Set environment variables for a context; `overwrite` also those that are set already."""
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


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Remove environment variables for a context: a process that starts in it has none of them."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@dataclass(frozen=True)
class Resources:
    """What the connected cluster has in total."""

    cpus: float
    gpus: float
    object_store: int  # bytes
    started_here: bool  # by this process, and ends with it
    nodes: tuple[tuple[float, float], ...] = ()  # CPUs and GPUs of each node, where they matter


@contextmanager
def ray_session(config: RayConfig, workers: int = 1) -> Iterator[Resources]:
    """Connect to Ray, or start it here for as long as the context lasts.

    Started here, it gets a logical CPU for each worker and two more for Ray Data: workers occupy
    theirs for the whole run. UserError: the cluster does not answer, or requires another token.
    """
    global _started_here, _context
    for name, value in core.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():  # the stages of a pipeline share one session
        yield _resources()
        return
    check_address(config)
    address = config.address or os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    tracking = {ray_train.STATE_TRACKING: "1"} if address or config.dashboard else {}
    # No provider announces the preemption of this machine.
    watching = {} if address else {ray_train.PREEMPTION_WATCHER: "0"}
    with environment(tracking), environment(watching, overwrite=True), ExitStack() as own:
        if address:
            _context = _connect(config, address)
        else:
            parent = Path(os.environ.get(core.TEMPORARY) or "/tmp")
            folder = own.enter_context(scratch_folder("rbr-", parent, has_logs=True))
            _context = _start(config, workers, folder)
        _started_here = not address
        try:
            token.close_token()
            if threading.current_thread() is threading.main_thread():  # Ray's would just exit
                signal.signal(signal.SIGTERM, on_sigterm)
            importlib.import_module("ray.data")  # configures its logger when it is first imported
            for name in ("ray", "ray.data", "ray.train"):
                logging.getLogger(name).setLevel(_level(config))
            if not config.logs:
                core.silence_node_events()  # a run reports lost workers itself
            if _started_here and not config.logs:
                core.stop_log_monitor()
            if address:
                warn_if_busy(address, ray.cluster_resources(), ray.available_resources())
            yield _resources()
        finally:
            _started_here, _context = False, None
            ray.shutdown()


def _connect(config: RayConfig, address: str) -> Any:
    import ray

    state = token.state_of_head(address)
    if state == "silent":
        raise UserError(
            f"{address}: something listens there, but it does not answer as a Ray head does; name "
            "the head's own port, 6379, or set ray.address to null"
        )
    if state == "token":
        token.use_token()
    with _init_errors(f"the Ray cluster at {address}"):
        return ray.init(address, **_options(config))


def _start(config: RayConfig, workers: int, folder: Path) -> Any:
    import ray

    token.make_token()
    with _without(_SECRETS), _init_errors("Ray on this machine"):
        return ray.init(
            "local",  # even if `ray start` has started a cluster on this machine
            num_cpus=max(cores(), workers) + 2,
            object_store_memory=int(config.object_store_gb * 1e9),
            include_dashboard=config.dashboard,
            **core.own_session(folder),
            **_options(config),
        )


def _options(config: RayConfig) -> dict[str, Any]:
    return {"log_to_driver": config.logs, "logging_level": _level(config)}


@contextmanager
def _init_errors(where: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise UserError(token.format_refusal(where)) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"{where} does not start or answer: {one_line(error)}") from None


def _level(config: RayConfig) -> int:
    return logging.INFO if config.logs else logging.ERROR


def check_address(config: RayConfig) -> None:
    """Raise UserError if nothing listens at the address: Ray would log retries for a minute."""
    address = config.address or os.environ.get("RAY_ADDRESS") or ""
    named = f"ray.address={address}" if config.address else f"RAY_ADDRESS={address}"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # Ray reports it
        return
    if not host or port is None:  # auto, local, a namespace of Ray's client
        return
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        other = "set it to null" if config.address else "unset it"
        raise UserError(
            f"{named}: nobody answers ({one_line(error)}); name the head of a running cluster, "
            f"or {other}, and a Ray is started on this machine"
        ) from None


def warn_if_busy(address: str, total: Mapping[str, float], free: Mapping[str, float]) -> None:
    """Log that a command will wait, where other jobs have every CPU of the cluster."""
    if free.get("CPU", 0.0) < 1:
        logging.getLogger(__name__).warning(
            "the Ray cluster at %s has %g CPUs, and none is free: other jobs have them, and this "
            "command waits",
            address,
            total.get("CPU", 0.0),
        )


def dashboard_url() -> str | None:
    """The address of the connected Ray's dashboard; None where it has none."""
    return f"http://{_context.dashboard_url}/" if _context and _context.dashboard_url else None


def logs_folder() -> Path | None:
    """Where the Ray that was started here writes its logs; None for any other Ray."""
    return Path(_context.address_info["session_dir"]) / "logs" if _started_here else None


def gpu_type(resources: Mapping[str, float]) -> str:
    """The type of the GPUs among Ray's resources, as H100; empty where Ray names none."""
    prefix = "accelerator_type:"
    return next((name.removeprefix(prefix) for name in resources if name.startswith(prefix)), "")


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
