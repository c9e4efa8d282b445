"""What `raybert predict` and `raybert fill-mask` do, beside reading their arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from raybert.display import Display
from raybert.errors import DataError
from raybert.experiment import Experiment
from raybert.ray_session import ray_session
from raybert.storage import Folder
from raybert.text.sources import SourceConfig

_TEXTS_A_CALL = 256


def lines(stream: BinaryIO) -> Iterator[str]:
    """Yield the texts of a stream, one a line, empty ones left out.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input: line {number} is not UTF-8 ({error.reason})"
            ) from None
        if text:
            yield text


def predict_texts(model: Folder, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Label texts in this process; yields text, label, score and all labels' scores."""
    from raybert.serve.classifier import TextClassifier

    classifier = TextClassifier(model)
    remaining = iter(texts)
    while chunk := list(itertools.islice(remaining, _TEXTS_A_CALL)):
        for text, scores in zip(chunk, classifier.probabilities(chunk), strict=True):
            best = int(scores.argmax())
            named = {n: round(float(s), 6) for n, s in zip(classifier.labels, scores, strict=True)}
            yield {
                "text": text,
                "label": classifier.labels[best],
                "score": round(float(scores[best]), 6),
                "scores": named,
            }


def predict_file(
    experiment: Experiment, model: Folder, path: str, output: str, display: Display
) -> dict[str, Any]:
    """Label a file, or many, through Ray Data."""
    from raybert.model import hub
    from raybert.serve.batch import predict_source

    names = hub.load_classifier(model)[1]
    columns = experiment.evaluate.source.model_dump(
        include={"text_column", "on_bad_row", "document"}
    )
    source = SourceConfig(path=path, **columns)
    with display.stage("predict"), ray_session(experiment.ray) as resources:
        return predict_source(
            source,
            model,
            output,
            names,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.line(f"{done:,} texts"),
        )


def fill_mask(model: Folder, text: str, top: int) -> list[list[dict[str, Any]]]:
    """The likeliest tokens for each mask of a text."""
    from raybert.model import hub
    from raybert.text.tokenizer import Tokenizer
    from raybert.train.pretrain import fillings

    return fillings(hub.load_masked_lm(model).eval(), Tokenizer.load(model), text, top)
