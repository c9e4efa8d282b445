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
from raybert.tasks.protocol import AnswerOptions
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
    model: Folder,
    batches: Iterable[Sequence[NumberedText]],
    precision: str = "auto",
    options: AnswerOptions | None = None,
) -> Iterator[dict[str, Any]]:
    """Predict texts in this process; yields row, text and the columns of the task.

    A model of pairs reads both texts of one, separated by a tab. A DataError where there is none.
    """
    from raybert.inference.classifier import TextClassifier

    classifier = TextClassifier(model, precision=precision)
    task = classifier.task
    for batch in batches:
        texts = [_split_pair(each) if classifier.reads_pairs else each.text for each in batch]
        answers = classifier.answers(texts, options or AnswerOptions(), cut=not task.is_per_token)
        for numbered, columns in zip(batch, task.columns(answers), strict=True):
            yield {"row": numbered.row, "text": numbered.text, **columns}


def _split_pair(numbered: NumberedText) -> tuple[str, str]:
    first, tab, second = numbered.text.partition("\t")
    if not (tab and first.strip() and second.strip()):
        raise DataError(
            f"text {numbered.row + 1}: the model reads pairs of texts; separate both by a tab"
        )
    return first, second


def predict_file(
    experiment: Experiment, model: Folder, path: str, output: str, display: Display
) -> dict[str, Any]:
    """Predict files by Ray Data; returns the counts."""
    from raybert.inference.bulk import predict_source
    from raybert.model import huggingface
    from raybert.tasks.labelled import with_columns_of
    from raybert.tasks.registry import read_columns

    columns = read_columns(model)
    huggingface.check_weights(model)  # missing or damaged weights are an error before Ray starts
    given = experiment.evaluate.source.model_dump(
        include={"text_column", "pair_column", "on_bad_row", "document", "format"}
    )
    # The model's own preprocessing handles HTML.
    source = with_columns_of(SourceConfig(path=path, html_breaks="keep", **given), columns)
    fingerprint(source)  # a missing file is an error before Ray starts
    with display.stage("predict"), ray_session(experiment.ray) as resources:
        return predict_source(
            source,
            model,
            output,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.progress(f"{done:,} texts"),
            precision=experiment.serve.precision,
        )
