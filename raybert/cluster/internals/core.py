"""Private parts of Ray Core: its environment, its processes and the head's key-value store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raybert.cluster.internals.private_names import has_private_api

#: Set before Ray is imported. Ray waits 30 s for its first process; on a busy machine it needs
#: more. The other one is Ray's advice in a warning that it prints without it.
ENVIRONMENT = {"RAY_gcs_server_port_wait_time_s": "120", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
#: Ray's niceness of 15 is for tasks beside a machine's other work.
NICENESS = "RAY_worker_niceness"
#: Ray gives a job three seconds between SIGTERM and SIGKILL; a checkpoint may take longer.
JOB_STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"

#: Where Ray makes its temporary files, instead of /tmp.
TEMPORARY = "RAY_TMPDIR"

#: Makes Ray's connections TLS ones, where it is not 0.
USE_TLS = "RAY_USE_TLS"

#: The RPC of a head that takes no arguments: it fails where a token is required.
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"

#: Loggers of Ray's job client that report packages and connections.
JOB_CLIENT_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)

_NAMESPACE = b"raybert"  # of the key-value store


def own_session(folder: Path) -> dict[str, Any]:
    """Arguments of `ray.init` for a Ray that is started here, with its files in a folder.

    Each of its processes wakes a hundred times a second, which takes 0.8% of a core, and a
    trainer's threads wait for the slowest one of them: of idle workers one is enough. Ray opens the
    folder of its files to everybody: it gets one inside.
    """
    return {"_system_config": {"num_workers_soft_limit": 1}, "_temp_dir": str(folder / "ray")}


def reload_environment() -> None:
    """Make Ray read its environment again: it has read it when it was imported."""
    import ray

    if has_private_api("session"):
        ray._raylet.Config.initialize("")


def silence_node_events() -> None:
    """Keep Ray from printing node events, such as lost workers, on this driver."""
    import ray

    if has_private_api("session"):
        ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None


def stop_log_monitor() -> None:
    """End the log monitor of the Ray that this process started: its output is not read."""
    import ray

    if has_private_api("session"):
        ray._private.worker._global_node.kill_log_monitor(check_alive=False)


def draining_nodes() -> set[str]:
    """The ids of the nodes that Ray was told will go away."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def _kv() -> Any:
    from ray.experimental import internal_kv

    return internal_kv


def kv_put(key: str, value: bytes, overwrite: bool = True) -> None:
    """Write a value into the key-value store of Ray's head."""
    _kv()._internal_kv_put(key, value, overwrite, namespace=_NAMESPACE)


def kv_get(key: str) -> bytes | None:
    """Read a value from the store; None where there is none."""
    value: bytes | None = _kv()._internal_kv_get(key, namespace=_NAMESPACE)
    return value


def kv_list(prefix: str) -> list[str]:
    """The sorted keys with a prefix."""
    keys: list[Any] = _kv()._internal_kv_list(prefix, namespace=_NAMESPACE)
    return sorted(key.decode() for key in keys)


def kv_delete(key: str, *, is_prefix: bool = False) -> None:
    """Delete a key, or all keys with a prefix."""
    _kv()._internal_kv_del(key, del_by_prefix=is_prefix, namespace=_NAMESPACE)
