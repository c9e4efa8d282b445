"""Start Ray Serve for the command line, on this machine or on a cluster, and stop it at the end.

Serve reads its environment when it is imported, and its processes inherit that of Ray: all of it
(`haproxy.py`) is set first.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from raybert.cluster.internals.serve import haproxy_template, http_options
from raybert.cluster.machine import cores
from raybert.cluster.scratch import scratch_folder
from raybert.cluster.session import RayConfig, environment, logs_folder, ray_session
from raybert.errors import RaybertError, UserError
from raybert.serve.client import Client, ServerError
from raybert.serve.deploy.haproxy import SCRATCH_PREFIX, serve_environment, uses_haproxy
from raybert.serve.deploy.haproxy_config import TemplateChangedError, check_template
from raybert.serve.deploy.status import State, extract_error
from raybert.serve.http.authentication import read_keys
from raybert.serve.settings import ServeConfig

ANSWER_S = 30.0  # for the first answer, once Serve reports that replicas run
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # all addresses of the machine


@contextmanager
def serving(
    config: ServeConfig, ray_config: RayConfig, *, on_progress: Callable[[str], None]
) -> Iterator[str]:
    """Serve while the context lasts, and yield the URL; running requests are completed at its end.

    Raises:
        UserError: a model or certificate is missing or invalid, the port is taken, or Ray does not
            start.
        RaybertError: no replica starts, or the address does not answer.
    """
    digests = read_keys(config.keys)
    on_cluster = bool(ray_config.address or os.environ.get("RAY_ADDRESS"))
    if not on_cluster:
        check_port(config.host, config.port)
        check_certificate(config)
        share = max(1, cores() // config.max_replicas)
        config = config.model_copy(update={"threads": config.threads or share})
    # One replica more, since an update starts new ones first.
    workers = math.ceil(config.cpus * (config.max_replicas + 1))
    with scratch_folder(Path(SCRATCH_PREFIX).name, Path(SCRATCH_PREFIX).parent) as scratch:
        with environment({} if on_cluster else serve_environment(config, scratch, digests)):
            from raybert.serve.deploy.deployment import check_access
            from raybert.serve.runtime.model_sources import check_models, resolve

            if not on_cluster and uses_haproxy(config):
                try:
                    check_template(haproxy_template())
                except TemplateChangedError as error:
                    raise UserError(str(error)) from None
            config = resolve(config)
            check_access(config.host, digests)
            check_models(config)
            with ray_session(ray_config, workers):
                if not ray_config.logs:
                    logging.getLogger("ray.serve").setLevel(logging.ERROR)
                try:
                    url = _deploy(config, digests, on_progress)
                    if not on_cluster:  # a cluster's head may be unreachable from here
                        check_answers(url)
                    yield url
                finally:
                    on_progress("completing running requests")
                    _stop(on_cluster)


def _deploy(config: ServeConfig, digests: list[str], on_progress: Callable[[str], None]) -> str:
    """Start Serve unless it runs, and the application on it; return the URL."""
    from ray import serve

    from raybert.serve.deploy.deployment import APP, application, check_access

    options: dict[str, Any] = {"host": config.host, "port": config.port}
    if config.tls_cert is not None:
        options |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    try:
        on_progress("starting Ray Serve")
        serve.start(http_options=options, proxy_location="EveryNode")
        http = http_options()
        check_access(http.host, digests)  # Serve may have been started with another host
        on_progress("loading the model")
        serve.run(application(config, digests), name=APP, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        state = serve.status().applications.get(APP)
        messages = [one.message for one in state.deployments.values()] if state else []
        raise RaybertError(extract_error("\n".join([str(error), *messages]))) from None
    scheme = "https" if http.ssl_certfile else "http"
    return f"{scheme}://{_url_host(http.host)}:{http.port}"


def check_certificate(config: ServeConfig) -> None:
    """Raise UserError for an invalid certificate: Serve would report success and not answer."""
    if config.tls_cert is None or config.tls_key is None:
        return
    files = {"tls_cert": config.tls_cert, "tls_key": config.tls_key}
    for name, given in files.items():
        try:
            Path(given).expanduser().read_bytes()
        except OSError as error:
            raise UserError(
                f"serve.{name}={given}: {error.strerror}; name a file in PEM form"
            ) from None
    try:
        cert, key = (Path(given).expanduser() for given in files.values())
        # With a password callback, since OpenSSL would prompt for one in every process.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        problem = getattr(error, "reason", None) or "can't be read"
        raise UserError(
            f"serve.tls_cert={config.tls_cert}, serve.tls_key={config.tls_key}: "
            f"{problem.lower().replace('_', ' ')}; name a certificate and its own key, in PEM form "
            "and without a password"
        ) from None


def check_answers(url: str) -> None:
    """Raise RaybertError unless a URL answers in ANSWER_S: Serve does not check the ingress."""
    parts = urlsplit(url)
    host = _url_host(_WILDCARDS.get(parts.hostname or "", parts.hostname or ""))
    context = ssl.create_default_context()
    context.check_hostname = False  # its names are for clients; nothing secret is sent
    context.verify_mode = ssl.CERT_NONE
    address = f"{parts.scheme}://{host}:{parts.port}"
    try:
        with Client(address, timeout_s=5, retry_timeout_s=ANSWER_S, context=context) as client:
            client.ready()
    except ServerError as error:
        raise RaybertError(
            f"{url}: the replicas run, but /health/ready does not answer ({error}); "
            f"see the logs in {log_folder()}"
        ) from None


def log_folder() -> Path | None:
    """Return the folder of the replicas' logs, if Ray was started here."""
    folder = logs_folder()
    return None if folder is None else folder / "serve"


def read_state() -> State | None:
    """Ask Serve for the state of the application; None: it was deleted."""
    from ray import serve

    from raybert.serve.deploy.deployment import APP

    status = serve.status()
    if not status.proxies:  # also where the controller does not answer in time
        return State(0, "Ray Serve does not run, or does not answer")
    application = status.applications.get(APP)
    if application is None:
        return None
    deployments = application.deployments.values()
    running = sum(
        count for one in deployments for at, count in one.replica_states.items() if at == "RUNNING"
    )
    problem = ""
    if application.status in ("UNHEALTHY", "DEPLOY_FAILED"):
        problem = extract_error(
            "\n".join([application.message, *(one.message for one in deployments)])
        )
    return State(running, problem)


def _stop(on_cluster: bool) -> None:
    """Delete the application; its replicas drain first."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from raybert.serve.deploy.deployment import APP

    if on_cluster:
        with suppress(RayServeException):  # Serve was shut down
            serve.delete(APP)
    else:
        serve.shutdown()


def _url_host(host: str) -> str:
    """Return a host as it is written in a URL."""
    return f"[{host}]" if ":" in host else host


class Listener(NamedTuple):
    """A process that listens on a port."""

    pid: int
    name: str
    is_orphan: bool  # the HAProxy of a `raybert serve` that was killed


def check_port(host: str, port: int) -> None:
    """Raise UserError if an address can't be bound; it names the listening process and a remedy."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            problem = f"{host}:{port} can't be listened on: {error.strerror or error}"
    advice = ""
    listener = find_listener(port)
    if listener is not None:
        problem += f" by process {listener.pid} ({listener.name})"
        if listener.is_orphan:
            advice = f"it was left by a `raybert serve` that was killed: `kill {listener.pid}`, or "
    raise UserError(f"{problem}; {advice}choose another serve.port or serve.host")


def find_listener(port: int) -> Listener | None:
    """Find the process that listens on a TCP port; None: no process that this user may inspect."""
    try:
        pids = [
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        for pid in pids:
            if pid is not None:
                process = psutil.Process(pid)
                return Listener(pid, process.name(), _is_orphan(process))
    except psutil.Error:  # it ended meanwhile, or macOS requires root
        pass
    return None


def _is_orphan(process: psutil.Process) -> bool:
    """Return whether a process is an HAProxy that we configured and whose Ray has ended."""
    if not any(argument.startswith(SCRATCH_PREFIX) for argument in process.cmdline()):
        return False
    parent = process.parent()
    return parent is None or not " ".join(parent.cmdline()).startswith("ray::")
