"""The application on Ray Serve: one deployment, whose replicas take HTTP and hold the models.

Ingress and model are in one process, for a hop between two costs milliseconds. `build` is what
`serve deploy` and a RayService import: `import_path: raybert.serve.deploy.deployment:build`, with
the keys of the `serve` section as `args`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve

from raybert.cluster.allocator import KEEP_FREED_MEMORY, keep_freed_memory
from raybert.cluster.internals.serve import http_options
from raybert.config import build as build_settings
from raybert.errors import ConfigError, DamagedError, UserError
from raybert.inference.classifier import TextClassifier
from raybert.inference.fill_mask import MaskFiller
from raybert.serve.http import load_shedding
from raybert.serve.http.authentication import VARIABLE, Keys, read_keys
from raybert.serve.http.routes import make_api
from raybert.serve.runtime import loaded_model, replica_log
from raybert.serve.runtime.metrics import Metrics
from raybert.serve.runtime.service import Service
from raybert.serve.settings import ServeConfig, is_own
from raybert.storage.folder import Folder
from raybert.storage.model_folders import resolve_model

NAME = "classifier"  # of the deployment, by which `serve deploy` sets its options
APP = "raybert"

#: Requests under way in a replica. What it can't answer in time it refuses by itself, with words;
#: behind this number Serve refuses, without.
_MOST_ONGOING = 2048


class Server:
    """A replica."""

    def __init__(self, settings: dict[str, Any], digests: list[str]) -> None:
        """Load the models.

        Args:
            settings: the `serve` section, resolved.
            digests: of the keys that are let in.
        """
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
            metrics=Metrics(replica=serve.get_replica_context().replica_tag),
            log=self._log,
        )
        self._service.load()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is made."""
        api = make_api(self._service, self._keys, log=self._log)
        if not self._service.config.cors:  # whose headers only the application knows
            load_shedding.set_admission(api.state.door)
        return api

    def check_health(self) -> None:
        """Called by Serve every few seconds; whoever fails three times is replaced."""
        self._service.check()

    def __del__(self) -> None:
        """Called by Serve when the replica has drained."""
        if hasattr(self, "_service"):  # it may have failed to load
            self._service.close()
            replica_log.write(self._log)


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application from the keys of the `serve` section.

    Raises:
        ConfigError: an unknown key, a value that does not fit, or no key for a server that others
            can reach.
        UserError: there is no such model, or no such file of keys.
    """
    config = build_settings(ServeConfig, args, "args")
    _check_names(config)
    config = completed(config)
    digests = read_keys(config.keys)
    check_is_closed(_listening_on() or config.host, digests)
    lacking = lacking_for_updates(config)
    if lacking:
        logging.getLogger("ray.serve").warning("%s", lacking)
    return application(config, digests)


def _check_names(config: ServeConfig) -> None:
    """Refuse names without a registry that could know them: no experiment stands behind the args.

    Raises:
        ConfigError: there is one.
    """
    named = [config.model, *config.models.values(), config.canary and config.canary.model]
    for given in named:
        if given and config.registry is None and "/" not in given and not Folder(given).exists():
            raise ConfigError(
                f"args.registry=null: {given} is no folder here, and as a name it is looked up in "
                "a registry; set args.registry to the storage that was promoted to"
            )


def lacking_for_updates(config: ServeConfig) -> str | None:
    """What the cluster lacks for a rolling update, in a line; None: nothing, as it is now."""
    if not config.surge_percent or not ray.is_initialized():
        return None
    least = config.replicas if isinstance(config.replicas, int) else config.replicas.min
    most = least + math.ceil(config.surge_percent * least / 100)
    there = ray.cluster_resources()
    for name, each in (("CPU", config.cpus), ("GPU", _gpus(config))):
        if most * each > there.get(name, 0.0):
            return (
                f"serve.surge_percent={config.surge_percent}: an update starts new replicas before "
                f"old ones end, for which this cluster has too little: {name} {most * each:g}, it "
                f"has {there.get(name, 0.0):g}. Unless it grows, an update will wait without end: "
                "set surge_percent to 0, and old replicas end first"
            )
    return None


def _gpus(config: ServeConfig) -> float:
    """What each replica takes of a GPU."""
    if config.gpus is not None:
        return config.gpus
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0


def completed(config: ServeConfig) -> ServeConfig:
    """Fill in what follows from the model: whether it labels or fills masks, and what lies beside.

    Paths become whole: replicas and proxies have other working directories.

    Raises:
        UserError: there is no such model.
    """
    config = _placed(config)
    if config.model is None:
        if config.fill_mask is None:
            raise ConfigError("serve.model=null: name a model/, a run, or an experiment")
        return config
    source = loaded_model.find(config.model, config.registry)
    folder = source.current()
    if loaded_model.fills_masks(folder):
        return config.model_copy(update={"model": None, "fill_mask": folder.uri})
    if config.fill_mask is None and source.storage is None:
        pretrained = Folder(config.model) / "pretrain"
        if pretrained.exists("model/config.json"):
            return config.model_copy(update={"fill_mask": resolve_model(pretrained.uri).uri})
    return config


def _placed(config: ServeConfig) -> ServeConfig:
    """The same with whole paths; what the registry knows by name stays a name."""

    def place(given: str) -> str:
        is_name = loaded_model.is_registered(given, config.registry)
        return given if is_name else Folder(given).uri

    canary, fill_mask = config.canary, config.fill_mask
    return config.model_copy(
        update={
            "model": None if config.model is None else place(config.model),
            "models": {name: place(given) for name, given in config.models.items()},
            "canary": canary and canary.model_copy(update={"model": place(canary.model)}),
            "fill_mask": None if fill_mask is None else Folder(fill_mask).uri,
            "registry": None if config.registry is None else Folder(config.registry).uri,
            "tls_cert": _whole(config.tls_cert),
            "tls_key": _whole(config.tls_key),
        }
    )


def _whole(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def check_models(config: ServeConfig) -> None:
    """Load every model once, so that a broken one is told before replicas are started.

    Raises:
        UserError: a model is not there, or is none of its kind.
        DamagedError: a file is cut short or altered.
    """
    given = {f"serve.models.{name}": one for name, one in config.models.items()}
    given |= {"serve.canary.model": config.canary.model} if config.canary is not None else {}
    given |= {"": config.model} if config.model is not None else {}  # as it was just typed
    for key, one in given.items():
        with _naming(key):
            TextClassifier(loaded_model.find(one, config.registry).current(), precision="fp32")
    if config.fill_mask is not None:
        with _naming("serve.fill_mask"):
            MaskFiller(loaded_model.find(config.fill_mask, None, stage="pretrain").current())


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Say which key named the model that is not there, or no good."""
    try:
        yield
    except (UserError, DamagedError) as error:
        raise type(error)(f"{key}: {error}" if key else str(error)) from None


def check_is_closed(host: str, digests: list[str]) -> None:
    """Refuse to answer everybody.

    Raises:
        ConfigError: others can connect, and there is no key.
    """
    if not digests and not is_own(host):
        raise ConfigError(
            f"serve.host={host}: others can connect there, so it needs a key: name a file with "
            f"serve.keys, or set {VARIABLE}; `openssl rand -hex 32` makes one"
        )


def application(config: ServeConfig, digests: list[str]) -> serve.Application:
    """Bind the deployment to its arguments.

    Args:
        config: resolved by `completed`.
        digests: of the keys that are let in.
    """
    replicas: dict[str, Any] = {"num_replicas": config.replicas}
    if not isinstance(config.replicas, int):
        scaling = config.replicas
        replicas = {
            "autoscaling_config": {
                "min_replicas": scaling.min,
                "max_replicas": scaling.max,
                "target_ongoing_requests": scaling.target,
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
        max_ongoing_requests=_MOST_ONGOING,
        max_queued_requests=_MOST_ONGOING,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        max_constructor_retry_count=3,
        max_surge_percent=config.surge_percent,
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    return deployment.bind(config.model_dump(mode="json"), digests)


def _listening_on() -> str | None:
    """The address that Serve's sockets are bound to; None where Serve does not run yet."""
    if not ray.is_initialized():
        return None
    try:
        options = http_options(must_run=False)
    except Exception as error:  # of Ray's many: nobody answers
        raise UserError(f"Ray Serve does not answer: {type(error).__name__}") from None
    return None if options is None else str(options.host)
