"""Predictions of the command line: arguments, lines of standard input, files."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from raybert.cluster.session import ray_session
from raybert.data.sources.cells import is_present
from raybert.data.sources.documents import column_names, describe, partition_names
from raybert.data.sources.settings import READING, SourceConfig
from raybert.errors import DataError, UserError
from raybert.experiment import Experiment
from raybert.pipeline.preflight import peek_corpus
from raybert.pipeline.ray_stage import first_progress
from raybert.storage.folder import Folder
from raybert.tasks.protocol import ALL_SCORES, AnswerOptions
from raybert.tasks.registry import read_columns, read_task
from raybert.terminal.display import Display

_TEXTS_PER_CALL = 256
_BYTES_PER_READ = 1 << 16


class NumberedText(NamedTuple):
    """A text, or both of a pair, and the number of its line or argument, from 0."""

    row: int
    text: str | tuple[str, str]


def number_texts(texts: Iterable[str | tuple[str, str]]) -> Iterator[list[NumberedText]]:
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
            text = line.decode("utf-8").removeprefix("" if row else "\ufeff").strip()
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
    """Predict texts in this process; yields row, text, pair, if there is one, and the columns.

    A model of pairs reads a text with its second one, or both separated by a tab.

    Raises:
        DataError: a text has no second one.
    """
    from raybert.inference.classifier import TextClassifier

    classifier = TextClassifier(model, precision=precision)
    task = classifier.task
    for batch in batches:
        given: list[dict[str, Any]] = []
        texts: list[str | tuple[str, str]] = []
        for numbered in batch:
            if classifier.reads_pairs:
                first, second = _pair_of(numbered)
                given.append({"row": numbered.row, "text": first, "pair": second})
                texts.append((first, second))
            else:
                text = str(numbered.text)
                given.append({"row": numbered.row, "text": text})
                texts.append(text)
        answers = classifier.answers(texts, options or ALL_SCORES)
        for known, columns in zip(given, task.columns(answers), strict=True):
            yield known | columns


def check_answer_options(model: Folder, options: AnswerOptions, *, has_pairs: bool) -> None:
    """Raise a UserError for options of `raybert predict` that do not fit the model."""
    task, reads_pairs = read_task(model)
    if has_pairs and not reads_pairs:
        raise UserError(f"--pair: the model {model} reads single texts; leave it out")
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise UserError(f"--threshold={options.threshold}: name a number")
    if options.threshold is not None and not task.has_threshold:
        raise UserError(
            f"--threshold={options.threshold:g}: a model for {task.title} selects nothing by its "
            "scores; leave it out"
        )


def _pair_of(numbered: NumberedText) -> tuple[str, str]:
    if isinstance(numbered.text, tuple):
        return numbered.text
    first, tab, second = numbered.text.partition("\t")
    if not (tab and first.strip() and second.strip()):
        raise DataError(
            f"text {numbered.row + 1} has no second text, and the model reads pairs; write both "
            "with a tab between them, or give the second one with --pair"
        )
    return first, second


IDS, ALL = "ids", "all"
# As id, review_id, Review-ID, reviewId, index.
_ID = re.compile(r"(?i:id|idx|index|uuid|guid|key)|.*(?:(?i:[_\-. ]id)|[a-z]I[dD])")


def is_id(column: str) -> bool:
    """Whether a column is an id by its name, as review_id."""
    return _ID.fullmatch(column) is not None


def choose_columns(source: SourceConfig, wanted: Sequence[str]) -> list[str]:
    """The names of the columns that predictions keep; a UserError for one that is not there."""
    present = column_names(source, labels=False)
    read = {source.text_column, source.pair_column}
    others = [name for name in dict.fromkeys(present) if name not in read]
    chosen: dict[str, None] = {}
    for column in wanted:
        if column == ALL:
            chosen |= dict.fromkeys(others)
        elif column == IDS and column not in present:
            chosen |= dict.fromkeys(name for name in others if is_id(name))
        elif is_present(column, present) or column in partition_names(source):
            chosen[column] = None
        else:
            known = ", ".join(others) or "none beside the text"
            raise UserError(
                f"--keep {column}: {', '.join(source.paths)} has no column of that name; there are "
                f"{known}"
            )
    return list(chosen)


def predict_file(
    experiment: Experiment,
    model: Folder,
    path: str,
    output: str,
    display: Display,
    options: AnswerOptions = ALL_SCORES,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Predict files by Ray Data; returns the counts.

    `keep` are columns that are written beside the predictions, "ids" or "all"; by default the
    configured ones, or the ids.
    """
    from raybert.data.sources.columns import with_columns_of
    from raybert.inference.bulk import predict_source
    from raybert.inference.prediction_file import check_output
    from raybert.model import huggingface

    check_output(output)
    columns = read_columns(model)
    huggingface.check_weights(model)  # missing or damaged weights are an error before Ray starts
    own = experiment.evaluate.source
    names = {"text_column", "pair_column", "on_bad_row", "document", "format", *READING}
    given = own.model_dump(include=names & own.model_fields_set)
    # The model's own preprocessing handles HTML.
    source = with_columns_of(SourceConfig(path=path, html_breaks="keep", **given), columns)
    wanted = keep or experiment.evaluate.source.keep_columns or [IDS]
    kept = choose_columns(source, wanted)  # a missing file is an error before Ray starts
    source = source.model_copy(update={"keep_columns": kept})
    peek_corpus(source)
    for line in describe(source):
        display.print(f"predict   reads {line}")
    with display.stage("predict", first_progress()), ray_session(experiment.ray) as resources:
        display.progress("starting workers, which import PyTorch and load the model")
        return predict_source(
            source,
            model,
            output,
            workers=max(1, int(resources.cpus) - 2),
            on_progress=lambda done: display.progress(f"{done:,} texts"),
            precision=experiment.serve.precision,
            options=options,
        )
