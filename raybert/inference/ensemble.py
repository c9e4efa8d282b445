"""Ensembles of classifiers: the mean of their probabilities, and as teachers in distillation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from raybert.errors import DamagedError, DataError
from raybert.inference.classifier import Text, TextClassifier
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.labelled import Labelled
from raybert.tasks.protocol import TextTask

ENSEMBLE = "ensemble.json"  # in an ensemble's folder: the folders of its models
_TEXTS_PER_CALL = 1024  # enough to sort by length, few enough to show progress


def members(folder: Folder) -> list[Folder]:
    """The models of an ensemble; empty if the folder is not one."""
    if not folder.exists(ENSEMBLE):
        return []
    found = folder.read_json(ENSEMBLE)
    names = found.get("models") if isinstance(found, dict) else None
    if not isinstance(names, list) or not names or not all(map(_is_inside, names)):
        raise DamagedError(
            f"{folder.join(ENSEMBLE)} is damaged: models are not paths in its folder"
        )
    return [folder / name for name in names]


def _is_inside(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and ".." not in name.split("/")
        and (not name.startswith("/"))
    )


def write_ensemble(folder: Folder, models: Sequence[str]) -> None:
    """Make a folder an ensemble of models at these paths inside it."""
    folder.write_json(ENSEMBLE, {"format_version": 1, "models": list(models)})


class Teacher:
    """One or several classifiers whose logits a student is trained on."""

    def __init__(
        self, models: Sequence[Folder], on_progress: Callable[[int], None] = lambda done: None
    ) -> None:
        """Take the models' folders; `on_progress` gets the number of texts scored so far."""
        self._models, self._on_progress = models, on_progress

    @property
    def identity(self) -> str:
        """A hash of all models' weights, in their order."""
        hashes = " ".join(map(huggingface.weights_hash, self._models))
        return hashlib.sha256(hashes.encode()).hexdigest()

    def logits(self, texts: Labelled, task: TextTask) -> npt.NDArray[np.float32]:
        """The outputs [n, L] of n texts, in the order of the student's, those of `task`."""
        found, done = [], 0
        for folder in self._models:
            classifier = TextClassifier(folder)
            if set(classifier.labels) != set(task.labels) or classifier.task.name != task.name:
                raise DataError(
                    f"finetune.distill.teacher: {folder} ({classifier.task.name}) knows the labels "
                    f"{', '.join(classifier.labels)}, the texts ({task.name}) have "
                    f"{', '.join(task.labels)}; take a teacher that was trained on the same labels"
                )
            columns = [classifier.labels.index(name) for name in task.labels]
            parts = []
            for begin in range(0, len(texts.texts), _TEXTS_PER_CALL):
                firsts = texts.texts.slice(begin, _TEXTS_PER_CALL).to_pylist()
                some: Sequence[Text] = firsts
                if texts.pairs is not None:
                    pairs = texts.pairs.slice(begin, _TEXTS_PER_CALL).to_pylist()
                    some = list(zip(firsts, pairs, strict=True))
                parts.append(np.asarray(classifier.logits(some))[:, columns])
                done += len(some)
                self._on_progress(done)
            found.append(np.concatenate(parts))
        return task.mean(found)
