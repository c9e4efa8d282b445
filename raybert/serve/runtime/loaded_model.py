"""The models that a replica holds: where each comes from, and one version of it in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raybert.errors import UserError
from raybert.inference.classifier import TextClassifier
from raybert.inference.explanations import Explainer
from raybert.inference.fill_mask import MaskFiller
from raybert.inference.windows import Row, pool
from raybert.model import huggingface
from raybert.serve.runtime.batching import Batcher, Failed
from raybert.serve.runtime.metrics import Metrics
from raybert.serve.runtime.threads import ModelThreads
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder
from raybert.storage.model_folders import resolve_model
from raybert.storage.registry import NAME, Registry

_INSIDE = ("model", "finetune", "pretrain")  # folders of a run that name nothing


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a folder, or a name whose version may change at any time."""

    name: str
    given: str
    storage: str | None = None  # of the registry that knows the name
    stage: str = "finetune"  # whose model is meant, where an experiment is given

    def current(self) -> Folder:
        """The folder of the version that is meant now.

        Raises:
            UserError: there is none.
        """
        if self.storage is None:
            return resolve_model(self.given, self.stage)
        return Registry(self.storage).current(self.given)


def find(
    given: str, storage: str | None, name: str | None = None, stage: str = "finetune"
) -> ModelSource:
    """Find what is meant by a path or by a name in the registry; a path that is there wins.

    Args:
        given: a folder with a model, a run, an experiment, or a registered name.
        storage: whose registry may know it.
        name: of the model in requests; None: the registered name, or that of the folder.
        stage: whose model is meant, where an experiment is given.

    Raises:
        UserError: there is neither.
    """
    if storage is not None and is_registered(given, storage):
        if Registry(storage).versions(given):
            return ModelSource(name or given, given, storage)
        raise UserError(
            f"{given}: neither a folder nor a name in the registry of {storage}; name a model/, a "
            "run, an experiment or a registered model"
        )
    folder = resolve_model(given, stage)
    parts = [part for part in folder.path.split("/") if part and part not in _INSIDE]
    return ModelSource(name or (parts[-1] if parts else "model"), given, stage=stage)


def is_registered(given: str, storage: str | None) -> bool:
    """Whether a model is looked up in the registry: by a name that no path has."""
    is_name = NAME.fullmatch(given) is not None
    return is_name and storage is not None and not Folder(given).exists()


def fills_masks(folder: Folder) -> bool:
    """Whether a model directory has a pretrained model, and no classifier."""
    kinds = folder.read_json("config.json").get("architectures") or [""]
    return str(kinds[0]).endswith("MaskedLM")


def check(folder: Folder) -> None:
    """Load a model of either kind once, to see that it is whole.

    Raises:
        UserError: it is none.
        DamagedError: a file is cut short or altered.
    """
    if fills_masks(folder):
        MaskFiller(folder)
    else:
        TextClassifier(folder, precision="fp32")


class LoadedModel:
    """One version of a classifier, in memory, with its queue."""

    def __init__(
        self,
        source: ModelSource,
        folder: Folder,
        config: ServeConfig,
        workers: ModelThreads,
        metrics: Metrics,
        *,
        device: str,
        precision: str,
    ) -> None:
        """Load it, and run it once as it will be run.

        Args:
            source: where it comes from.
            folder: the version's model directory.
            config: how it is served.
            workers: in which models compute.
            metrics: are told of its batches.
            device: cpu or cuda.
            precision: as in `TextClassifier`.

        Raises:
            UserError: there is no classifier there.
            DamagedError: a file is cut short or altered.
        """
        self.source, self.folder, self.name = source, folder, source.name
        self.classifier = TextClassifier(folder, device=device, precision=precision)
        if config.tokens_per_batch is not None:
            self.classifier.tokens_per_batch = config.tokens_per_batch
        self.weights = huggingface.weights_hash(folder)
        registered = source.storage is not None
        self.version = folder.path.rstrip("/").rpartition("/")[2] if registered else ""
        self.version = self.version or self.weights[:8]
        self._explainer: Explainer | None = None

        def note(rows: int, tokens: int, seconds: float) -> None:
            metrics.add("batches_total", model=self.name)
            metrics.add("batch_texts_total", rows, model=self.name)
            metrics.add("batch_tokens_total", tokens, model=self.name)
            metrics.add("batch_seconds_total", seconds, model=self.name)

        self.batcher = Batcher(
            self.classifier.score,
            workers,
            tokens_per_batch=self.classifier.tokens_per_batch,
            queue_s=config.queue_s,
            wait_s=config.wait_ms / 1000,
            on_batch=note,
        )
        workers.warm(self.classifier.warm)

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the scores."""
        return self.classifier.labels

    @property
    def explainer(self) -> Explainer:
        """What explains it; used by one thread at a time."""
        if self._explainer is None:
            self._explainer = Explainer(self.classifier)
        return self._explainer

    def encode(self, texts: Sequence[str], *, windows: bool) -> tuple[list[Row], list[int]]:
        """Turn texts into rows, and say how many of them each text has. Safe for threads."""
        if not windows:
            rows = self.classifier.encode(texts)
            return rows, [1] * len(rows)
        cut = self.classifier.encode_windows(texts)
        return [row for text in cut for row in text], [len(text) for text in cut]

    async def score(self, rows: Sequence[Row], counts: Sequence[int]) -> npt.NDArray[np.float32]:
        """Score what `encode` made of texts: logits [texts, labels].

        Raises:
            Overloaded: too much waits already.
            Failed: the model failed.
        """
        logits = pool(await self.batcher.score(rows), counts)
        if not np.isfinite(logits).all():
            raise Failed(ValueError("scores are not finite: the weights have diverged"))
        return logits
