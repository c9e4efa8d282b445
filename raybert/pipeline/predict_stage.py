"""Predictions of the command line: arguments, lines of standard input, files."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from raybert.cluster.session import ray_session
from raybert.data.sources.documents import fingerprint
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.experiment import Experiment
from raybert.storage.folder import Folder
from raybert.terminal.display import Display

_TEXTS_PER_CALL = 256
_BYTES_PER_READ = 1 << 16


class NumberedText(NamedTuple):
    """A text and the number of its line or argument, from 0."""

    row: int
    text: str


def number_texts(texts: Iterable[str]) -> Iterator[list[NumberedText]]:
    """Number texts and yield them in batches."""
    remaining = itertools.starmap(NumberedText, enumerate(texts))
    while chunk := list(itertools.islice(remaining, _TEXTS_PER_CALL)):
        yield chunk


def read_lines(stream: io.BufferedIOBase) -> Iterator[list[NumberedText]]:
    """Yield the lines of a stream as they arrive; empty lines are only counted."""
    number, pieces = 0, [b""]  # pieces of the incomplete line
    while True:
        read = stream.read1(_BYTES_PER_READ)  # blocks only while nothing has arrived
        pieces.append(read)
        if read and b"\n" not in read:
            continue
        *lines, last = b"".join(pieces).split(b"\n")
        lines, pieces = (lines, [last]) if read else ([*lines, last], [])
        for begin in range(0, len(lines), _TEXTS_PER_CALL):
            yield from _decode(lines[begin : begin + _TEXTS_PER_CALL], number + begin)
        number += len(lines)
        if not read:
            return


def _decode(found: Sequence[bytes], first: int) -> Iterator[list[NumberedText]]:
    texts: list[NumberedText] = []
    for row, line in enumerate(found, first):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            if texts:
                yield texts
            raise DataError(
                f"standard input: line {row + 1} is not UTF-8 ({error.reason})"
            ) from None
        if text:
            texts.append(NumberedText(row, text))
    if texts:
        yield texts


def predict_texts(
    model: Folder, batches: Iterable[Sequence[NumberedText]], precision: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Classify texts in this process; yields row, text, label, score and all labels' scores."""
    from raybert.inference.classifier import TextClassifier

    classifier = TextClassifier(model, precision=precision)
    for batch in batches:
        found = classifier.probabilities([text for _, text in batch])
        for (row, text), scores in zip(batch, found, strict=True):
            best = int(scores.argmax())
            named = {n: round(float(s), 6) for n, s in zip(classifier.labels, scores, strict=True)}
            yield {
                "row": row,
                "text": text,
                "label": classifier.labels[best],
                "score": round(float(scores[best]), 6),
                "scores": named,
            }


def predict_file(
    experiment: Experiment, model: Folder, path: str, output: str, display: Display
) -> dict[str, Any]:
    """Classify files by Ray Data; returns the counts."""
    from raybert.inference.bulk import predict_source
    from raybert.model import huggingface

    names = huggingface.read_label_names(model)
    huggingface.check_weights(model)  # missing or damaged weights are an error before Ray starts
    columns = experiment.evaluate.source.model_dump(
        include={"text_column", "on_bad_row", "document", "format"}
    )
    # The model's own preprocessing handles HTML.
    source = SourceConfig(path=path, html_breaks="keep", **columns)
    fingerprint(source)  # a missing file is an error before Ray starts
    with display.stage("predict"), ray_session(experiment.ray) as resources:
        return predict_source(
            source,
            model,
            output,
            names,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.progress(f"{done:,} texts"),
            precision=experiment.serve.precision,
        )
