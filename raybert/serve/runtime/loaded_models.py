"""Which models a replica holds, and how it follows the registry without a restart."""

from __future__ import annotations

import asyncio
import functools
import logging

from raybert.errors import ConfigError, RaybertError, StorageError
from raybert.inference import precision_choice
from raybert.inference.fill_mask import MaskFiller
from raybert.serve.runtime import loaded_model
from raybert.serve.runtime.loaded_model import LoadedModel, ModelSource
from raybert.serve.runtime.metrics import Metrics
from raybert.serve.runtime.threads import ModelThreads, run_in_new_thread
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder


class LoadedModels:
    """The models of a replica."""

    def __init__(
        self,
        config: ServeConfig,
        workers: ModelThreads,
        metrics: Metrics,
        log: logging.Logger,
        device: str,
    ) -> None:
        """Start empty; models will compute in the workers' threads."""
        self._config, self._workers, self._device = config, workers, device
        self._metrics, self._log = metrics, log
        self.served: dict[
            str, LoadedModel
        ] = {}  # classifiers by name; the first is meant by no name
        self.canary: LoadedModel | None = None
        self.filler: MaskFiller | None = None
        self.filler_name = ""
        self._failed: dict[str, str] = {}  # what could not be loaded, or why, by model

    @property
    def first(self) -> LoadedModel | None:
        """The classifier that is meant by no name."""
        return next(iter(self.served.values()), None)

    def all(self) -> list[LoadedModel]:
        """All classifiers, the canary among them."""
        return [*self.served.values(), *([self.canary] if self.canary else [])]

    def load(self) -> None:
        """Load everything.

        Raises:
            UserError: a model is not there, or is none of its kind; two have one name.
            DamagedError: a file is cut short or altered.
        """
        config = self._config
        if config.model is not None:
            self._add(loaded_model.find(config.model, config.registry))
        for name, given in config.models.items():
            self._add(loaded_model.find(given, config.registry, name))
        if config.canary is not None:
            source = loaded_model.find(config.canary.model, config.registry)
            self.canary = self._load(source, source.current())
        if config.fill_mask is not None:
            source = loaded_model.find(config.fill_mask, None, stage="pretrain")
            self.filler = MaskFiller(source.current(), device=self._device)
            self.filler_name = source.name

    def _add(self, source: ModelSource) -> None:
        if source.name in self.served:
            raise ConfigError(
                f"serve.models: two models have the name {source.name}; give one another name"
            )
        self.served[source.name] = self._load(source, source.current())

    def _load(self, source: ModelSource, folder: Folder, like: str | None = None) -> LoadedModel:
        """Load a version in the precision that all replicas take; `like`: that of another."""
        config, device = self._config, self._device
        precision: str = config.precision
        if precision == "auto":
            precision = precision_choice.select_precision(folder, device, like)
        return LoadedModel(
            source,
            folder,
            config,
            self._workers,
            self._metrics,
            device=device,
            precision=precision,
        )

    async def watch(self) -> None:
        """Look at the registry again and again, where a model comes from there."""
        while any(served.source.storage is not None for served in self.all()):
            await asyncio.sleep(self._config.poll_s)
            try:
                await self.refresh()
            except Exception:  # whatever a storage's client raises, the next look is due
                self._log.exception("looking at the registry failed")

    async def refresh(self) -> None:
        """Take over the versions that the registry names now.

        One that can't be loaded is told once in the log, and the version before serves on. Requests
        that have begun are answered by the version that they began with.
        """
        for served in self.all():
            source = served.source
            if source.storage is None:
                continue
            folder = served.folder
            try:
                folder = await asyncio.to_thread(source.current)
                if folder.uri in (served.folder.uri, self._failed.get(source.name)):
                    continue
                precision = served.classifier.precision
                load = functools.partial(self._load, source, folder, precision)
                new = await asyncio.to_thread(run_in_new_thread, load, self._workers.threads)
            except StorageError as error:  # may be better the next time
                self._log.warning("model %s: %s", source.name, error)
            except RaybertError as error:
                tried = str(error) if folder is served.folder else folder.uri
                if self._failed.get(source.name) == tried:  # the registry itself is damaged
                    continue
                self._failed[source.name] = tried
                self._metrics.add("model_loads_total", model=source.name, outcome="refused")
                self._log.error(
                    "model %s: %s; version %s serves on", source.name, error, served.version
                )
            else:
                self._replace(served, new)

    def _replace(self, old: LoadedModel, new: LoadedModel) -> None:
        if old is self.canary:
            self.canary = new
        else:
            self.served[new.name] = new
        self._failed.pop(new.name, None)
        self._metrics.add("model_loads_total", model=new.name, outcome="loaded")
        self._log.info("model %s: version %s now serves", new.name, new.version)
