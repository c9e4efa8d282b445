"""What `raybert predict` and `raybert fill-mask` do, beside reading their arguments."""

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

_TEXTS_A_CALL = 256
_BYTES_A_READ = 1 << 16


class Numbered(NamedTuple):
    """A text, and the number from 0 of the line or argument that it is."""

    row: int
    text: str


def numbered(texts: Iterable[str]) -> Iterator[list[Numbered]]:
    """Number texts and yield them some hundred at a time."""
    remaining = itertools.starmap(Numbered, enumerate(texts))
    while chunk := list(itertools.islice(remaining, _TEXTS_A_CALL)):
        yield chunk


def lines(stream: io.BufferedIOBase) -> Iterator[list[Numbered]]:
    """Yield the lines of a stream as they come, empty ones left out but counted.

    Raises:
        DataError: a line is not UTF-8; those before it have been yielded.
    """
    number, pieces = 0, [b""]  # of a line that has not ended yet
    while True:
        read = stream.read1(_BYTES_A_READ)  # what has come; waits only where nothing has
        pieces.append(read)
        if read and b"\n" not in read:
            continue
        *whole, last = b"".join(pieces).split(b"\n")
        whole, pieces = (whole, [last]) if read else ([*whole, last], [])
        for begin in range(0, len(whole), _TEXTS_A_CALL):
            yield from _decoded(whole[begin : begin + _TEXTS_A_CALL], number + begin)
        number += len(whole)
        if not read:
            return


def _decoded(found: Sequence[bytes], first: int) -> Iterator[list[Numbered]]:
    texts: list[Numbered] = []
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
            texts.append(Numbered(row, text))
    if texts:
        yield texts


def predict_texts(
    model: Folder, batches: Iterable[Sequence[Numbered]], precision: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Label texts in this process; yields row, text, label, score and all labels' scores."""
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
    """Label a file, or many, through Ray Data."""
    from raybert.inference.bulk import predict_source
    from raybert.model import huggingface

    names = huggingface.read_label_names(model)
    columns = experiment.evaluate.source.model_dump(
        include={"text_column", "on_bad_row", "document", "format"}
    )
    # Texts as they stand: the model's own preprocessing sees to HTML.
    source = SourceConfig(path=path, html_breaks="keep", **columns)
    fingerprint(source)  # that there is such a file, before Ray is started
    with display.stage("predict"), ray_session(experiment.ray) as resources:
        return predict_source(
            source,
            model,
            output,
            names,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.line(f"{done:,} texts"),
            precision=experiment.serve.precision,
        )


def fill_mask(model: Folder, text: str, top: int) -> list[list[dict[str, Any]]]:
    """The likeliest tokens for each mask of a text."""
    from raybert.inference.fill_mask import MaskFiller

    return MaskFiller(model).fill(text, top)
