"""The models in a replica's memory, and how they follow the registry without a restart."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Sequence

import numpy as np

from raybert.errors import ConfigError, RaybertError, StorageError
from raybert.inference import precision_choice
from raybert.inference.classifier import Encoded, Text, TextClassifier, is_finite, pool
from raybert.inference.explanations import Explainer
from raybert.inference.fill_mask import MaskFiller
from raybert.model import huggingface
from raybert.serve.runtime.batching import Batcher, ModelFailed, ModelThreads, run_in_new_thread
from raybert.serve.runtime.metrics import ServeMetrics
from raybert.serve.runtime.model_sources import ModelSource, find_source
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder
from raybert.tasks.protocol import Outputs


class LoadedModel:
    """One version of a classifier in memory, with its queue."""

    def __init__(
        self,
        source: ModelSource,
        folder: Folder,
        config: ServeConfig,
        threads: ModelThreads,
        metrics: ServeMetrics,
        *,
        device: str,
        precision: str,
    ) -> None:
        """Load the version in `folder`, and run it once for each number of threads.

        UserError: there is no classifier; DamagedError: a file is cut short or altered.
        """
        self.source, self.folder, self.name = source, folder, source.name
        self.last_scored_ms = 0  # Unix time
        self.classifier = TextClassifier(folder, device=device, precision=precision)
        if config.tokens_per_batch is not None:
            self.classifier.tokens_per_batch = config.tokens_per_batch
        self.weights_hash = huggingface.weights_hash(folder)
        is_registered = source.registry is not None
        self.version = folder.path.rstrip("/").rpartition("/")[2] if is_registered else ""
        self.version = self.version or self.weights_hash[:8]

        def count_batch(rows: int, tokens: int, seconds: float) -> None:
            metrics.add("batches_total", model=self.name)
            metrics.add("batch_texts_total", rows, model=self.name)
            metrics.add("batch_tokens_total", tokens, model=self.name)
            metrics.add("batch_seconds_total", seconds, model=self.name)

        threads.warm_up(self.classifier.warm)
        tokens = sum(map(len, self.classifier.full_batch()))
        self.batcher = Batcher(
            self.classifier.score,
            threads,
            tokens_per_batch=self.classifier.tokens_per_batch,
            queue_s=config.queue_s,
            wait_s=config.wait_ms / 1000,
            speed=tokens / max(1e-9, threads.measure(self.classifier.warm)),
            on_batch=count_batch,
        )

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the scores."""
        return self.classifier.labels

    @functools.cached_property
    def explainer(self) -> Explainer:
        """The explainer, made at its first use; one thread at a time may use it."""
        return Explainer(self.classifier)

    def encode(self, texts: Sequence[Text], *, windows: bool) -> Encoded:
        """Tokenize texts, cut or in windows; count n-grams for a part of the model. Thread-safe."""
        if windows and not self.classifier.reads_pairs:
            rows, lengths = self.classifier.encode_windows(texts)
            encoded = Encoded(rows, lengths, [False] * len(texts))
        else:
            encoded = self.classifier.encode_cut(texts)
        return encoded._replace(ngrams=self.classifier.ngram_outputs(texts))

    async def score(self, encoded: Encoded) -> Outputs:
        """Compute the outputs of each text of what `encode` returned.

        Raises Overloaded, or ModelFailed, also if they are not finite.
        """
        scored: Outputs = await self.batcher.score(encoded.rows)
        self.last_scored_ms = int(1000 * time.time())
        if not self.classifier.task.is_per_token:
            scored = np.stack(list(scored))
        outputs = pool(scored, encoded.lengths, self.classifier.longest)
        outputs = self.classifier.with_ngrams(outputs, encoded.ngrams)
        if not is_finite(outputs):
            raise ModelFailed(ValueError("scores are not finite: the weights have diverged"))
        return outputs


class LoadedModels:
    """All models of a replica."""

    def __init__(
        self,
        config: ServeConfig,
        threads: ModelThreads,
        metrics: ServeMetrics,
        log: logging.Logger,
        device: str,
    ) -> None:
        self._config, self._threads, self._device = config, threads, device
        self._metrics, self._log = metrics, log
        self.classifiers: dict[str, LoadedModel] = {}  # by name; the first is the default
        self.canary: LoadedModel | None = None
        self.mask_filler: MaskFiller | None = None
        self.mask_filler_name = ""
        self._failed: dict[str, str] = {}  # by model, the last logged failure to load a version

    @property
    def default(self) -> LoadedModel | None:
        """The classifier for requests that name none."""
        return next(iter(self.classifiers.values()), None)

    def all(self) -> list[LoadedModel]:
        """Return all classifiers, including the canary."""
        return [*self.classifiers.values(), *([self.canary] if self.canary else [])]

    def load(self) -> None:
        """Load all configured models; ConfigError: two have the same name."""
        config = self._config
        if config.model is not None:
            self._add(find_source(config.model, config.registry))
        for name, location in config.models.items():
            self._add(find_source(location, config.registry, name))
        if config.canary is not None:
            source = find_source(config.canary.model, config.registry)
            self.canary = self._load(source, source.current())
        if config.fill_mask is not None:
            source = find_source(config.fill_mask, None, stage="pretrain")
            self.mask_filler = MaskFiller(source.current(), device=self._device)
            self.mask_filler_name = source.name

    def _add(self, source: ModelSource) -> None:
        if source.name in self.classifiers:
            raise ConfigError(
                f"serve.models: two models have the name {source.name}; give one another name"
            )
        self.classifiers[source.name] = self._load(source, source.current())

    def _load(self, source: ModelSource, folder: Folder, like: str | None = None) -> LoadedModel:
        """Load a version; with `precision: auto` prefer the precision of another one, `like`."""
        config, device = self._config, self._device
        precision: str = config.precision
        if precision == "auto":
            precision = precision_choice.select_precision(folder, device, like)
        threads, metrics = self._threads, self._metrics
        return LoadedModel(
            source, folder, config, threads, metrics, device=device, precision=precision
        )

    async def watch(self) -> None:
        """Refresh every `poll_s` seconds, if any model comes from the registry."""
        while any(model.source.registry is not None for model in self.all()):
            await asyncio.sleep(self._config.poll_s)
            try:
                await self.refresh()
            except Exception:  # a storage client may raise anything; the next poll tries again
                self._log.exception("reading the registry failed")

    async def refresh(self) -> None:
        """Load the versions that are now current in the registry.

        A version that can't be loaded is logged once, and the previous one remains. Running
        requests are completed by the version that they began with.
        """
        for model in self.all():
            source = model.source
            if source.registry is None:
                continue
            folder = model.folder
            try:
                folder = await asyncio.to_thread(source.current)
                if folder.uri in (model.folder.uri, self._failed.get(source.name)):
                    continue
                precision = model.classifier.precision
                load = functools.partial(self._load, source, folder, precision)
                new = await asyncio.to_thread(run_in_new_thread, load, self._threads.threads)
            except StorageError as error:  # may be temporary
                self._log.warning("model %s: %s", source.name, error)
            except RaybertError as error:
                # Without a folder it is the registry that is damaged.
                failure = str(error) if folder is model.folder else folder.uri
                if self._failed.get(source.name) == failure:
                    continue
                self._failed[source.name] = failure
                self._metrics.add("model_loads_total", model=source.name, outcome="refused")
                self._log.error(
                    "model %s: %s; version %s remains", source.name, error, model.version
                )
            else:
                self._replace(model, new)

    def _replace(self, old: LoadedModel, new: LoadedModel) -> None:
        if old is self.canary:
            self.canary = new
        else:
            self.classifiers[new.name] = new
        self._failed.pop(new.name, None)
        self._metrics.add("model_loads_total", model=new.name, outcome="loaded")
        self._log.info("model %s: version %s is loaded", new.name, new.version)
