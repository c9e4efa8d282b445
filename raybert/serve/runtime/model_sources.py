"""Find the models that paths and registered names refer to, and check them before a start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raybert.errors import ConfigError, DamagedError, UserError
from raybert.inference.classifier import TextClassifier
from raybert.inference.fill_mask import MaskFiller
from raybert.model import huggingface
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder
from raybert.storage.missing import near_names
from raybert.storage.registry import NAME, Registry, find_model, hub_hint, resolve_model

_GENERIC = ("model", "finetune", "pretrain")  # folders of a run, which do not name the model


@dataclass(frozen=True)
class ModelSource:
    """A folder, or a registered name whose current version may change at any time."""

    name: str
    location: str  # a path, or the registered name
    registry: str | None = None  # the storage whose registry has the name
    stage: str = "finetune"  # of an experiment, if the location is one

    def current(self) -> Folder:
        """Return the folder of the current version, or raise UserError."""
        if self.registry is None:
            return resolve_model(self.location, self.stage)
        return Registry(self.registry).current(self.location)


def find_source(
    location: str, registry: str | None, name: str | None = None, stage: str = "finetune"
) -> ModelSource:
    """Find a model by a path or by a name in the registry, or raise UserError; a path has priority.

    `name` is the model's name in requests, None: the registered one, or that of the folder. Of an
    experiment the model of `stage` is used.
    """
    if registry is not None and is_registered_name(location, registry):
        if Registry(registry).versions(location):
            return ModelSource(name or location, location, registry)
        beside = f"{registry.rstrip('/')}/{location}"  # an experiment, by its name alone
        is_run = find_model(Folder(registry) / location, stage) is not None
        near = f" (did you mean {beside}?)" if is_run else near_names(location)
        raise UserError(
            f"{location}: neither a folder nor a name in the registry of {registry}{near}; name a "
            f"model/, a run, an experiment or a registered model{hub_hint(location)}"
        )
    folder = resolve_model(location, stage)
    parts = [part for part in folder.path.split("/") if part and part not in _GENERIC]
    return ModelSource(name or (parts[-1] if parts else "model"), location, stage=stage)


def is_registered_name(location: str, registry: str | None) -> bool:
    """Return whether a model is looked up in the registry: a name that is not an existing path."""
    is_name = NAME.fullmatch(location) is not None
    return is_name and registry is not None and not Folder(location).exists()


def is_masked_lm(folder: Folder) -> bool:
    """Return whether a model directory has a pretrained model and no classifier."""
    architectures = huggingface.read_config_json(folder).get("architectures") or [""]
    return str(architectures[0]).endswith("MaskedLM")


def check_model(folder: Folder) -> None:
    """Load a model of either kind once; UserError: there is none, DamagedError: it is damaged."""
    if is_masked_lm(folder):
        MaskFiller(folder)
    else:
        TextClassifier(folder, precision="fp32")


def resolve(config: ServeConfig) -> ServeConfig:
    """Fill in what the model determines: its kind, and the pretrained model of its experiment.

    Paths become absolute, since replicas and proxies have other working directories. UserError: a
    model does not exist.
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
    """Raise ConfigError for a name without a registry: `args` of `serve deploy` have no default."""
    locations = [config.model, *config.models.values(), config.canary and config.canary.model]
    for location in locations:
        is_name = location and "/" not in location and not Folder(location).exists()
        if is_name and config.registry is None:
            raise ConfigError(
                f"args.registry=null: {location} is no folder here, and as a name it is looked up "
                "in a registry; set args.registry to the storage that was promoted to"
            )


def check_models(config: ServeConfig) -> None:
    """Load every model once, so that a damaged one is reported before replicas start."""
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
