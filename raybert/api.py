"""raybert from Python: the stages and their defaults are those of the command line.

`import raybert` imports none of this: its names are looked up here when they are first used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from raybert.config import flatten, load
from raybert.errors import UserError
from raybert.experiment import Experiment
from raybert.inference.classifier import Text, TextClassifier
from raybert.pipeline import self_training_stage, stages
from raybert.pipeline.memory_texts import source_path
from raybert.storage.registry import resolve_model
from raybert.tasks.protocol import AnswerOptions, Outputs
from raybert.terminal.display import Display

Settings = Mapping[str, Any]  # dotted keys, or nested sections, with their values
Config = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Run:
    """A finished stage."""

    folder: str  # of the experiment, as `raybert report` and `raybert serve` take it
    model: str  # the `model/` directory
    metrics: dict[str, Any]  # what the command prints with `--json`

    def classifier(self, **options: Any) -> Classifier:
        """Load the model; `options` are those of `Classifier.load`."""
        return Classifier.load(self.model, **options)


def pretrain(
    data: Any = None,
    *,
    name: str | None = None,
    config: Config = None,
    settings: Settings | None = None,
    text_column: str | None = None,
    on_ray: bool = True,
    quiet: bool = False,
) -> Run:
    """Build a corpus and pretrain an encoder on it, as `raybert corpus` and `raybert pretrain`.

    `data` is a path, or texts in memory (`raybert.pipeline.memory_texts`); None: what the
    configuration names. The same `name` resumes. `on_ray=False` trains in this process; the corpus
    is built by Ray Data all the same.
    """
    given = {"corpus.source.path": data, "corpus.source.text_column": text_column}
    experiment = _experiment(given, name, config, settings)
    display = Display(quiet)
    stages.make_corpus(experiment, display)
    return _run(experiment, stages.pretrain(experiment, display, in_process=not on_ray))


def finetune(
    data: Any = None,
    *,
    test: Any = None,
    name: str | None = None,
    config: Config = None,
    settings: Settings | None = None,
    text_column: str | None = None,
    label_column: str | list[str] | None = None,
    on_ray: bool = True,
    quiet: bool = False,
) -> Run:
    """Fine-tune a classifier on labelled texts, as `raybert finetune`.

    It starts from the model that `pretrain` made under the same `name`, or from what
    `settings["finetune.initialize_from"]` names. With `test`, labelled texts, the metrics are those
    of `raybert evaluate` on them; else those of the validation.
    """
    given = _labelled(data, test, text_column, label_column)
    experiment = _experiment(given, name, config, settings)
    display = Display(quiet)
    result = self_training_stage.finetune(experiment, display, in_process=not on_ray)
    if test is not None:
        result = {**stages.evaluate(experiment, display), "model": result["model"]}
    return _run(experiment, result)


def tune(
    data: Any = None,
    *,
    test: Any = None,
    trials: int | None = None,
    minutes: float | None = None,
    name: str | None = None,
    config: Config = None,
    settings: Settings | None = None,
    text_column: str | None = None,
    label_column: str | list[str] | None = None,
    quiet: bool = False,
) -> Run:
    """Search fine-tuning hyperparameters, as `raybert tune`; the model is the winner's.

    Without `test`, the winner is not measured on further texts (`tune.test: false`).
    """
    from raybert.pipeline.tune_stage import tune as search

    given = _labelled(data, test, text_column, label_column)
    given |= {"tune.trials": trials, "tune.minutes": minutes}
    if data is not None and test is None:
        given["tune.test"] = False
    experiment = _experiment(given, name, config, settings)
    return _run(experiment, search(experiment, Display(quiet)))


class Classifier:
    """A fine-tuned model that answers as `raybert predict` does."""

    def __init__(self, model: TextClassifier) -> None:
        self._model = model

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: str = "cpu", precision: str = "auto"
    ) -> Classifier:
        """Load a `model/` directory, or that of a run, an experiment or a `Run`'s folder.

        Raises:
            UserError: there is no model.
        """
        folder = resolve_model(os.fspath(path))
        return cls(TextClassifier(folder, device=device, precision=precision))

    @property
    def labels(self) -> list[str]:
        """The names of the outputs."""
        return list(self._model.labels)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, texts: str, *, top_k: int | None = None, threshold: float | None = None
    ) -> dict[str, Any]: ...

    @overload
    def __call__(
        self, texts: Sequence[Text], *, top_k: int | None = None, threshold: float | None = None
    ) -> list[dict[str, Any]]: ...

    def __call__(
        self,
        texts: str | Sequence[Text],
        *,
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The answers of texts, or of pairs of texts: the columns that `raybert predict` prints.

        Of one string, one answer. `top_k` and `threshold` are those of the command.
        """
        given = self._checked([texts] if isinstance(texts, str) else texts)
        task = self._model.task
        if threshold is not None and not task.has_threshold:
            raise UserError(f"threshold={threshold:g}: a model for {task.title} has no scores")
        if not given:
            return []
        options = AnswerOptions(top_k=top_k, threshold=threshold)
        answers = self._model.answers(given, options)
        columns = task.columns(answers)
        return columns[0] if isinstance(texts, str) else columns

    def probabilities(self, texts: Sequence[Text]) -> npt.NDArray[np.float32] | Outputs:
        """Calibrated probabilities, or numbers in their unit: fp32 [n, L], L as in `labels`.

        Of a model that tags tokens, a list with an array [T, L] for each text.
        """
        return self._model.probabilities(self._checked(texts))

    def _checked(self, texts: Sequence[Text]) -> list[Text]:
        found = [text if isinstance(text, str) else tuple(text) for text in texts]
        for index, text in enumerate(found):
            if isinstance(text, str) == self._model.reads_pairs:
                wanted = "a pair of texts" if self._model.reads_pairs else "one text"
                raise UserError(f"text {index}: the model reads {wanted}, got {text!r:.60}")
        return found  # type: ignore[return-value]


def _labelled(
    data: Any, test: Any, text_column: str | None, label_column: str | list[str] | None
) -> dict[str, Any]:
    """The keys of texts to train on, and to evaluate on."""
    return {
        "finetune.source.path": data,
        "finetune.source.text_column": text_column,
        "finetune.source.label_column": label_column,
        "evaluate.source.path": test,
    }


def _experiment(
    given: Mapping[str, Any], name: str | None, config: Config, settings: Settings | None
) -> Experiment:
    """The configuration of a call: the file, then its arguments, then `settings`."""
    nested: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        nested |= dict(flatten({key: value})) if isinstance(value, Mapping) else {key: value}
    path = None if config is None else Path(config)
    names = {} if name is None else {"run.name": name}
    # In-memory texts are written beside the experiment.
    folder = load(Experiment, path, _overrides({**nested, **names}), options="settings").folder
    found = {key: value for key, value in given.items() if value is not None}
    for key, value in found.items():
        if key.endswith(".path"):
            found[key] = source_path(value, folder / "inputs")
    return load(Experiment, path, _overrides({**found, **nested, **names}), options="settings")


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _run(experiment: Experiment, result: dict[str, Any]) -> Run:
    return Run(experiment.folder.uri, str(result["model"]), result)
