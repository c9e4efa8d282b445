"""Serving from the command line: Ray Serve on this machine or on a cluster, until told to end.

Serve reads its environment when it is imported, and its processes inherit that of Ray: all of it
(`ingress.py`) is set before.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raybert.cluster.internals.serve import haproxy_template, http_options
from raybert.cluster.machine import cores
from raybert.cluster.session import RayConfig, environment, logs_folder, ray_session
from raybert.errors import RaybertError, UserError
from raybert.serve.client import Client, ServerError
from raybert.serve.deploy.haproxy import SCRATCH_PREFIX, serve_environment, uses_haproxy
from raybert.serve.deploy.haproxy_config import TemplateChangedError, check_template
from raybert.serve.deploy.ports import check_port
from raybert.serve.deploy.status import State, reason
from raybert.serve.http.authentication import read_keys
from raybert.serve.settings import ServeConfig

ANSWER_S = 30.0  # for the address to answer, once Serve says that all is well
_EVERY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # that stand for all of a machine's addresses


@contextmanager
def serving(
    config: ServeConfig, ray_config: RayConfig, *, on_progress: Callable[[str], None]
) -> Iterator[str]:
    """Serve for as long as the context lasts; requests that have begun are answered at its end.

    Args:
        config: what is served, and how; `model` is set.
        ray_config: which Ray to use.
        on_progress: is told how far it is.

    Yields:
        The address, `http://127.0.0.1:8000`.

    Raises:
        UserError: no such model or certificate, the port is taken, Ray does not start.
        RaybertError: no replica comes up, or the address does not answer.
    """
    digests = read_keys(config.keys)
    on_cluster = bool(ray_config.address or os.environ.get("RAY_ADDRESS"))
    if not on_cluster:
        check_port(config.host, config.port)
        check_certificate(config)
        config = config.model_copy(update={"threads": config.threads or _threads(config)})
    # One replica more than there are, for an update starts the new ones first.
    workers = math.ceil(config.cpus * (config.most_replicas + 1))
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir="/"))
    try:
        with environment({} if on_cluster else serve_environment(config, scratch, digests)):
            from raybert.serve.deploy.deployment import check_is_closed, check_models, completed

            if not on_cluster and uses_haproxy(config):
                _check_haproxy_template()
            config = completed(config)
            check_is_closed(config.host, digests)
            check_models(config)  # before Ray is started for nothing
            with ray_session(ray_config, workers):
                if not ray_config.logs:
                    logging.getLogger("ray.serve").setLevel(logging.ERROR)
                try:
                    url = _deploy(config, digests, on_progress)
                    if not on_cluster:  # whose head may be out of reach from here
                        check_answers(url)
                    yield url
                finally:
                    on_progress("answering what has begun")
                    _end(on_cluster)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_haproxy_template() -> None:
    """Check that Ray's HAProxy configuration can be adapted, before Ray is started.

    Raises:
        UserError: it has changed.
    """
    try:
        check_template(haproxy_template())
    except TemplateChangedError as error:
        raise UserError(str(error)) from None


def _deploy(config: ServeConfig, digests: list[str], on_progress: Callable[[str], None]) -> str:
    """Start Serve where it does not run, and the application on it; returns its address."""
    from ray import serve

    from raybert.serve.deploy.deployment import APP, application, check_is_closed

    options: dict[str, Any] = {"host": config.host, "port": config.port}
    if config.tls_cert is not None:
        options |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    try:
        on_progress("starting Ray Serve")
        serve.start(http_options=options, proxy_location="EveryNode")
        there = http_options()
        check_is_closed(there.host, digests)  # of a Serve that others have started
        on_progress("loading the model")
        serve.run(application(config, digests), name=APP, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        state = serve.status().applications.get(APP)
        told = [one.message for one in state.deployments.values()] if state else []
        raise RaybertError(reason("\n".join([str(error), *told]))) from None
    scheme = "https" if there.ssl_certfile else "http"
    return f"{scheme}://{_shown(there.host)}:{there.port}"


def check_certificate(config: ServeConfig) -> None:
    """Refuse a certificate that can't be used: Serve would say that it answers, and does not.

    Raises:
        UserError: a file can't be read, or it is not a certificate and its own key.
    """
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
        # Without a password: OpenSSL would ask for one on the terminal, of every process.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "can't be read"
        raise UserError(
            f"serve.tls_cert={config.tls_cert}, serve.tls_key={config.tls_key}: "
            f"{reason.lower().replace('_', ' ')}; name a certificate and its own key, in PEM form "
            "and without a password"
        ) from None


def check_answers(url: str) -> None:
    """Ask for an answer where clients will: Serve's word is of its replicas, not of what is before.

    Raises:
        RaybertError: none comes within ANSWER_S.
    """
    parts = urlsplit(url)
    host = _shown(_EVERY.get(parts.hostname or "", parts.hostname or ""))
    context = ssl.create_default_context()
    context.check_hostname = False  # whom it is for, only clients know; nothing secret is sent
    context.verify_mode = ssl.CERT_NONE
    asked = f"{parts.scheme}://{host}:{parts.port}"
    try:
        with Client(asked, timeout_s=5, patience_s=ANSWER_S, context=context) as client:
            client.ready()
    except ServerError as error:
        raise RaybertError(
            f"{url}: the replicas run, and /health/ready has no answer ({error}); "
            f"the logs in {log_folder()} say more"
        ) from None


def log_folder() -> Path | None:
    """Where the replicas of a Ray that was started here write their log; None elsewhere."""
    found = logs_folder()
    return None if found is None else found / "serve"


def state() -> State | None:
    """How the application is, as Serve sees it; None: it is not there any more."""
    from ray import serve

    from raybert.serve.deploy.deployment import APP

    status = serve.status()
    if not status.proxies:  # which is also what a controller that is slow to answer leads to
        return State(0, "Ray Serve does not run, or does not answer")
    found = status.applications.get(APP)
    if found is None:
        return None
    deployments = found.deployments.values()
    running = sum(
        count for one in deployments for at, count in one.replica_states.items() if at == "RUNNING"
    )
    trouble = ""
    if found.status in ("UNHEALTHY", "DEPLOY_FAILED"):
        trouble = reason("\n".join([found.message, *(one.message for one in deployments)]))
    return State(running, trouble)


def _end(on_cluster: bool) -> None:
    """Take the application away, once its replicas have drained."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from raybert.serve.deploy.deployment import APP

    if on_cluster:
        with suppress(RayServeException):  # somebody has ended Serve
            serve.delete(APP)
    else:
        serve.shutdown()


def _threads(config: ServeConfig) -> int:
    """A replica's share of the cores of this machine."""
    return max(1, cores() // config.most_replicas)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
