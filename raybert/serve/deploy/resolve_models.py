"""Resolve the models of a configuration before replicas start: paths, kinds and integrity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raybert.errors import ConfigError, DamagedError, UserError
from raybert.inference.classifier import TextClassifier
from raybert.inference.fill_mask import MaskFiller
from raybert.serve.runtime.model_sources import find_source, is_masked_lm, is_registered_name
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder
from raybert.storage.registry import resolve_model


def resolve(config: ServeConfig) -> ServeConfig:
    """Fill in what the model determines: its kind, and the pretrained model of its experiment.

    Paths become absolute: replicas and proxies have other working directories.

    Raises:
        UserError: a model does not exist.
    """
    config = _with_absolute_paths(config)
    if config.model is None:
        if config.fill_mask is None:
            raise ConfigError("serve.model=null: name a model/, a run, or an experiment")
        return config
    source = find_source(config.model, config.registry)
    folder = source.current()
    if is_masked_lm(folder):
        return config.model_copy(update={"model": None, "fill_mask": folder.uri})
    if config.fill_mask is None and source.registry is None:
        pretrained = Folder(config.model) / "pretrain"
        if pretrained.exists("model/config.json"):
            return config.model_copy(update={"fill_mask": resolve_model(pretrained.uri).uri})
    return config


def _with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """Return the same with absolute paths; registered names remain names."""

    def absolute(location: str) -> str:
        is_name = is_registered_name(location, config.registry)
        return location if is_name else Folder(location).uri

    canary, fill_mask = config.canary, config.fill_mask
    return config.model_copy(
        update={
            "model": None if config.model is None else absolute(config.model),
            "models": {name: absolute(location) for name, location in config.models.items()},
            "canary": canary and canary.model_copy(update={"model": absolute(canary.model)}),
            "fill_mask": None if fill_mask is None else Folder(fill_mask).uri,
            "registry": None if config.registry is None else Folder(config.registry).uri,
            "tls_cert": _absolute_file(config.tls_cert),
            "tls_key": _absolute_file(config.tls_key),
        }
    )


def _absolute_file(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def check_names(config: ServeConfig) -> None:
    """Check that names have a registry: `args` of `serve deploy` belong to no experiment.

    Raises:
        ConfigError: a name has none.
    """
    locations = [config.model, *config.models.values(), config.canary and config.canary.model]
    for location in locations:
        is_name = location and "/" not in location and not Folder(location).exists()
        if is_name and config.registry is None:
            raise ConfigError(
                f"args.registry=null: {location} is no folder here, and as a name it is looked up "
                "in a registry; set args.registry to the storage that was promoted to"
            )


def check_models(config: ServeConfig) -> None:
    """Load every model once, so that a damaged one is reported before replicas start.

    Raises:
        UserError: a model does not exist or is of the wrong kind.
        DamagedError: a file is cut short or altered.
    """
    locations = {f"serve.models.{name}": location for name, location in config.models.items()}
    if config.canary is not None:
        locations["serve.canary.model"] = config.canary.model
    if config.model is not None:
        locations[""] = config.model  # the command's argument, which needs no key
    for key, location in locations.items():
        with _naming_key(key):
            folder = find_source(location, config.registry).current()
            TextClassifier(folder, precision="fp32")
    if config.fill_mask is not None:
        with _naming_key("serve.fill_mask"):
            MaskFiller(find_source(config.fill_mask, None, stage="pretrain").current())


@contextmanager
def _naming_key(key: str) -> Iterator[None]:
    """Prepend the key that names a model to the errors about it."""
    try:
        yield
    except (UserError, DamagedError) as error:
        raise type(error)(f"{key}: {error}" if key else str(error)) from None
