"""The application on Ray Serve: one deployment whose replicas receive HTTP and hold the models.

Ingress and model are in one process, since a hop between two costs milliseconds. `serve deploy` and
a RayService import `build`: `import_path: raybert.serve.deploy.deployment:build`, with the keys of
the `serve` section as `args`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from typing import Any

import ray
import torch
from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve
from ray.serve.config import AutoscalingPolicy
from ray.serve.exceptions import RayServeException

from raybert.cluster.internals.serve import HAPROXY, http_options
from raybert.cluster.machine import KEEP_FREED_MEMORY, keep_freed_memory
from raybert.config import build as build_settings
from raybert.errors import ConfigError, UserError
from raybert.serve.deploy.haproxy_socket import count_refused
from raybert.serve.deploy.scaling import LOAD, count_replicas
from raybert.serve.http.api import flush, make_api
from raybert.serve.http.authentication import VARIABLE, Keys, read_keys
from raybert.serve.http.middleware import set_admission
from raybert.serve.runtime.metrics import ServeMetrics, render
from raybert.serve.runtime.model_sources import check_names, resolve
from raybert.serve.runtime.service import Service
from raybert.serve.settings import ServeConfig, is_loopback

NAME = "classifier"  # of the deployment; `serve deploy` sets its options by this name
APP = "raybert"

#: Requests in a replica at once. Below this number the replica rejects by itself, with a reason;
#: above it Serve rejects, without one.
_MAX_ONGOING = 2048


#: For the other replicas' metrics; Prometheus waits 10 s for a scrape.
_SCRAPE_S = 2.0


class Server:
    """A replica."""

    def __init__(self, settings: dict[str, Any], digests: list[str]) -> None:
        """Load the models of the `serve` section, resolved; `digests` are of the accepted keys."""
        config = build_settings(ServeConfig, settings, "serve")
        context = ray.get_runtime_context()
        gpu = bool(context.get_accelerator_ids().get("GPU")) and torch.cuda.is_available()
        cpus = float(context.get_assigned_resources().get("CPU", 1))
        if not gpu:
            keep_freed_memory()
        self._keys, self._log = Keys(digests), logging.getLogger("ray.serve")
        self._service = Service(
            config,
            device="cuda" if gpu else "cpu",
            threads=config.threads or max(1, int(cpus)),
            metrics=ServeMetrics(replica=serve.get_replica_context().replica_tag),
            log=self._log,
        )
        self._service.load()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Serve calls this once, after the constructor."""
        api = make_api(
            self._service, self._keys, log=self._log, metrics_of_all=self._metrics_of_all
        )
        if not self._service.config.cors:  # only the application adds CORS headers
            set_admission(api.state.admission)
        return api

    def metrics(self) -> list[Metric]:
        """Return this replica's metrics; the others call this."""
        return self._service.metrics.families()

    async def _metrics_of_all(self) -> str:
        """Return the metrics of all replicas, or of this one if they do not answer in time."""
        families = [self._service.metrics.families()]
        try:
            handle = serve.get_deployment_handle(NAME, serve.get_replica_context().app_name)
            asked = handle.broadcast("metrics")
            answers = await asked.results_async(timeout_s=_SCRAPE_S, return_exceptions=True)
            families = [each for each in answers if isinstance(each, list)] or families
        except (TimeoutError, RuntimeError, RayServeException) as error:
            self._log.warning("metrics of this replica only: %s", type(error).__name__)
        socket = os.environ.get(f"{HAPROXY}SOCKET_PATH")
        refused = await asyncio.to_thread(count_refused, socket) if socket else None
        return render(families, refused)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load for `count_replicas`; Serve calls this regularly."""
        return {LOAD: self._service.load_since_last()}

    def check_health(self) -> None:
        """Raise where the replica is unhealthy; Serve calls this, and replaces it after 3 times."""
        self._service.check_health()

    def __del__(self) -> None:
        """Stop the threads; Serve calls this when the replica has drained."""
        if hasattr(self, "_service"):  # the constructor may have failed
            self._service.close()
            flush(self._log)


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application from the keys of the `serve` section, or raise UserError."""
    config = build_settings(ServeConfig, args, "args")
    check_names(config)
    config = resolve(config)
    digests = read_keys(config.keys)
    check_access(_serve_host() or config.host, digests)
    shortage = find_update_shortage(config)
    if shortage:
        logging.getLogger("ray.serve").warning("%s", shortage)
    return application(config, digests)


def find_update_shortage(config: ServeConfig) -> str | None:
    """Return one line about the resources that a rolling update lacks now; None: none."""
    if not config.surge_percent or not ray.is_initialized():
        return None
    replicas = config.replicas if isinstance(config.replicas, int) else config.replicas.min
    during_update = replicas + math.ceil(config.surge_percent * replicas / 100)
    available = ray.cluster_resources()
    for name, per_replica in (("CPU", config.cpus), ("GPU", _gpus(config))):
        if during_update * per_replica > available.get(name, 0.0):
            return (
                f"serve.surge_percent={config.surge_percent}: an update starts new replicas before "
                f"old ones end and needs {name} {during_update * per_replica:g}, but this cluster "
                f"has {available.get(name, 0.0):g}. Unless it grows, an update will not finish: "
                "set surge_percent to 0, then old replicas end first"
            )
    return None


def _gpus(config: ServeConfig) -> float:
    """Return the GPUs of each replica."""
    if config.gpus is not None:
        return config.gpus
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0


def check_access(host: str, digests: list[str]) -> None:
    """Raise ConfigError for a server that others can reach without a key."""
    if not digests and not is_loopback(host):
        raise ConfigError(
            f"serve.host={host}: others can connect there, so it needs a key: name a file with "
            f"serve.keys, or set {VARIABLE}; `openssl rand -hex 32` makes one"
        )


def application(config: ServeConfig, digests: list[str]) -> serve.Application:
    """Bind the deployment to a resolved configuration and the digests of the accepted keys."""
    config = config.with_allowed_hosts(has_keys=bool(digests))
    replicas: dict[str, Any] = {"num_replicas": config.replicas}
    if not isinstance(config.replicas, int):
        scaling = config.replicas
        replicas = {
            "autoscaling_config": {
                "min_replicas": scaling.min,
                "max_replicas": scaling.max,
                "target_ongoing_requests": scaling.target,
                "policy": AutoscalingPolicy(policy_function=count_replicas),
            }
        }
    gpus = _gpus(config)
    actor: dict[str, Any] = {"num_cpus": config.cpus, "num_gpus": gpus}
    if not gpus and ray.is_initialized() and not ray.get_runtime_context().runtime_env:
        actor["runtime_env"] = {"env_vars": KEEP_FREED_MEMORY}
    deployment = serve.deployment(
        serve.ingress()(Server),
        name=NAME,
        **replicas,
        ray_actor_options=actor,
        max_ongoing_requests=_MAX_ONGOING,
        max_queued_requests=_MAX_ONGOING,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        max_constructor_retry_count=3,
        max_surge_percent=config.surge_percent,
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    return deployment.bind(config.model_dump(mode="json"), digests)


def _serve_host() -> str | None:
    """Return the address that a running Serve listens on; None: Serve does not run yet."""
    if not ray.is_initialized():
        return None
    try:
        options = http_options(must_run=False)
    except Exception as error:  # any of Ray's many types
        raise UserError(f"Ray Serve does not answer: {type(error).__name__}") from None
    return None if options is None else str(options.host)
