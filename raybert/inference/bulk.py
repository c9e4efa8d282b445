"""Score a source with a classifier on Ray Data: bulk prediction into a file, and evaluation.

Files are streamed, actors hold the model, and results keep the order of the source, so that memory
does not grow with the number of texts.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import pyarrow as pa

from raybert.cluster.internals.data import ordered_execution
from raybert.cluster.machine import cores
from raybert.data.corpus.tokenize_job import read_dataset
from raybert.data.sources import documents
from raybert.data.sources.row_table import KEPT, LabelParser, accept
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.inference import scored_texts
from raybert.inference.behaviour import measure_behaviour
from raybert.inference.classifier import Text, TextClassifier, pool, read_ngrams
from raybert.inference.prediction_file import PredictionWriter
from raybert.inference.scored_texts import ragged, rows_of, stacked
from raybert.inference.slices import slice_scores
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.comparison import Predictions
from raybert.tasks.labelled import Labelled
from raybert.tasks.protocol import ALL_SCORES, AnswerOptions
from raybert.tasks.registry import read_task

_BLOCK_BYTES = 1 << 20  # of Ray Data's blocks
_SHOWN_LABEL_ERRORS = 20
_ROWS_PER_CALL = 512  # enough texts to sort by length, few enough to show progress


class _Scorer:
    """An actor's classifier: adds `outputs` and `targets`, or `answer`, to tables of texts."""

    def __init__(
        self, model: str, threads: int, precision: str, has_labels: bool, options: AnswerOptions
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self._classifier = TextClassifier(Folder(model), precision=precision)
        self._has_labels, self._options = has_labels, options

    def __call__(self, table: pa.Table) -> pa.Table:
        # A bad row is scored as an empty text; `score` drops it, or raises, in the source's order.
        classifier, task = self._classifier, self._classifier.task
        firsts = [text or "" for text in table["text"].to_pylist()]
        texts: Sequence[Text] = firsts
        if classifier.reads_pairs:
            seconds = [text or "" for text in table["pair"].to_pylist()]
            texts = list(zip(firsts, seconds, strict=True))
        if not self._has_labels:
            answers = classifier.answers(texts, self._options)
            columns = task.columns(answers)
            found = pa.array([json.dumps(each, ensure_ascii=False) for each in columns])
            return table.append_column("answer", found)
        labels = table["label"].to_pylist()
        if classifier.reads_pairs:
            encoded = classifier.encode_cut(texts)
            rows, lengths, is_long = encoded.rows, encoded.lengths, encoded.is_cut
        else:
            rows, lengths = classifier.encode_windows(texts)
            is_long = [length > classifier.longest for length in lengths]
        table = table.append_column("is_long", pa.array(is_long))
        encoder = pool(classifier.score(rows), lengths, classifier.longest)
        if task.is_per_token:
            outputs = encoder
            words = classifier.words(texts) or []
            targets = [
                task.token_targets(label or "[]", row, length)
                for label, row, length in zip(labels, words, lengths, strict=True)
            ]
        else:
            outputs = classifier.with_ngrams(encoder, classifier.ngram_outputs(texts))
            if classifier.ngrams is not None:
                table = table.append_column("encoder_outputs", ragged(encoder))
            targets = [np.atleast_1d(row) for row in task.targets_where_known(labels)]
        return table.append_column("outputs", ragged(outputs)).append_column(
            "targets", ragged(targets)
        )


def score(
    source: SourceConfig,
    model: Folder,
    *,
    labels: LabelParser | None,
    workers: int,
    skipped: Counter[str],
    precision: str = "auto",
    options: AnswerOptions = ALL_SCORES,
) -> Iterator[pa.Table]:
    """Yield tables of texts, row and what `_Scorer` adds, in the order of the source.

    `row` counts all rows of the source from 0, skipped ones included; `skipped`, by reason, is
    updated. With `labels` every row must have one. `workers` actors hold the classifier in `model`.
    A DataError for the first bad row, or an unreadable file.
    """
    from ray.data import ActorPoolStrategy

    shards = documents.sampled_shards(source, labels=labels, skipped=skipped)
    left, rows = source.limit, 0
    with ordered_execution(_BLOCK_BYTES):
        texts = read_dataset(source, shards, readers=workers, labels=labels)
        with warnings.catch_warnings():
            # Ray 2.60 deprecates `max_restarts` here, and has no named parameter for it yet.
            warnings.simplefilter("ignore")
            scored = texts.map_batches(
                _Scorer,
                fn_constructor_args=(
                    model.uri,
                    max(1, cores() // workers),
                    precision,
                    labels is not None,
                    options,
                ),
                batch_size=_ROWS_PER_CALL,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
                num_cpus=1,
                max_restarts=0,  # a lost actor ends the command; it is short
            )
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            table = table.append_column("row", pa.array(range(rows, rows + len(table))))
            rows += len(table)
            good = accept(table, source.on_bad_row, skipped).slice(0, left)
            left = None if left is None else left - len(good)
            if len(good):
                yield good
            if left == 0:
                return


def predict_source(
    source: SourceConfig,
    model: Folder,
    output: str,
    *,
    workers: int,
    on_progress: Callable[[int], None],
    precision: str = "auto",
    options: AnswerOptions = ALL_SCORES,
) -> dict[str, Any]:
    """Write a source's predictions to the file `output`; return the counts.

    `on_progress` gets the number of texts so far. A DataError as in `score`, and if there is no
    text at all.
    """
    skipped: Counter[str] = Counter()
    done = 0
    task, _ = read_task(model)
    scored = score(
        source,
        model,
        labels=None,
        workers=workers,
        skipped=skipped,
        precision=precision,
        options=options,
    )
    given = ["row", "text", *(["pair"] if source.pair_column is not None else [])]
    kept = _kept_types(source, {*given, *(field.name for field in task.column_types())})
    with PredictionWriter(output, given, task, kept) as writer:
        for table in scored:
            rows = table.select(given).to_pylist()
            columns = map(json.loads, table[KEPT].to_pylist()) if kept else itertools.repeat([])
            answers = map(json.loads, table["answer"].to_pylist())
            writer.write(
                [
                    row | dict(zip(kept, values, strict=True)) | answer
                    for row, values, answer in zip(rows, columns, answers, strict=False)
                ]
            )
            done += len(table)
            on_progress(done)
        if not done:
            raise DataError(f"{source.path}: no texts")
    return {"texts": done, "skipped": dict(skipped), "output": output}


def _kept_types(source: SourceConfig, taken: Set[str]) -> dict[str, pa.DataType]:
    """The types of the source's columns that are written, by the names that they are written under.

    A column whose name a prediction has, as `label`, is written as `input_label`.
    """
    known = documents.column_types(source) if source.keep_columns else {}
    types = {}
    for column in source.keep_columns:
        name = column
        while name in taken or name in types:
            name = f"input_{name}"
        types[name] = known.get(column, pa.string())
    return types


def evaluate(
    source: SourceConfig,
    model: Folder,
    *,
    workers: int,
    on_progress: Callable[[int], None],
    baseline: Folder | None = None,
    keep: Folder | None = None,
    behaviour_texts: int = 0,
) -> dict[str, Any]:
    """Score labelled texts with the classifier in `model`, and compare it with a linear model.

    `on_progress` gets the number of texts so far; `baseline` is the folder of the linear model, if
    there is one; the outputs are stored in the folder `keep`; behaviour is tested on
    `behaviour_texts` of the texts. Returns what the task's `evaluate` does, with
    `texts_per_second`, `skipped`, `long_texts` (their number), `slices`, `label_errors`,
    `examples`, `baseline` and `behaviour`. A DataError as in `score`.
    """
    encoder_task, _ = read_task(model)
    part = read_ngrams(model)
    task = encoder_task if part is None else part.task
    # The model's own preprocessing, as in training and in serving.
    breaks = huggingface.read_preprocessing(model).get("html_breaks", "space")
    source = source.model_copy(update={"labels": task.labels, "html_breaks": breaks})
    skipped: Counter[str] = Counter()
    begun, tables, done = time.monotonic(), [], 0
    parser = task.parser(source)
    for table in score(source, model, labels=parser, workers=workers, skipped=skipped):
        tables.append(table)
        done += len(table)
        on_progress(done)
    if not tables:
        raise DataError(f"{source.path}: no labelled texts")
    outputs, targets = stacked(
        rows_of(tables, "outputs"),
        rows_of(tables, "targets"),
        len(task.labels),
        per_token=task.is_per_token,
    )
    seconds = time.monotonic() - begun
    parts = {}
    if "encoder_outputs" in tables[0].column_names:
        alone = np.stack(rows_of(tables, "encoder_outputs"))
        parts["encoder_alone"] = encoder_task.validate(alone, targets)
    texts = _labelled(tables)
    ours, beside = Predictions(task, outputs, targets), {}
    if keep is not None:
        scored_texts.save(keep, texts, ours)
    if baseline is not None:
        beside = _beside_baseline(ours, baseline, texts)
    if behaviour_texts:
        rows: Sequence[Text] = texts.texts.to_pylist()
        if texts.pairs is not None:
            rows = list(zip(texts.texts.to_pylist(), texts.pairs.to_pylist(), strict=True))
        classifier = TextClassifier(model)
        beside["behaviour"] = measure_behaviour(classifier, rows, ours, behaviour_texts)
    return {
        **task.evaluate(outputs, targets),
        "task": task.name,
        "metric": task.default_metric,
        "texts_per_second": round(done / max(1e-9, seconds), 1),
        "skipped": dict(skipped),
        "long_texts": sum(sum(table["is_long"].to_pylist()) for table in tables),
        **parts,
        **beside,
        "slices": slice_scores(ours, texts.texts.to_pylist(), _kept_values(source, tables)),
        "label_errors": _label_errors(ours, texts),
        "examples": [
            {"text": texts.texts[row].as_py()[:1000], **found}
            for row, found in task.examples(outputs, targets)
        ],
    }


def _label_errors(found: Predictions, texts: Labelled) -> dict[str, Any]:
    """The number of labels that are probably wrong, and the surest ones."""
    rows = found.task.label_errors(found.outputs, found.targets)
    shown = [
        {"text": texts.texts[row].as_py()[:1000], **about}
        for row, about in rows[:_SHOWN_LABEL_ERRORS]
    ]
    return {"count": len(rows), "examples": shown}


def _kept_values(source: SourceConfig, tables: Sequence[pa.Table]) -> dict[str, list[Any]]:
    """The values of `keep_columns` for each text."""
    if not source.keep_columns:
        return {}
    rows = [json.loads(value) for table in tables for value in table[KEPT].to_pylist()]
    return dict(zip(source.keep_columns, map(list, zip(*rows, strict=True)), strict=True))


def _labelled(tables: Sequence[pa.Table]) -> Labelled:
    table = pa.concat_tables(tables, promote_options="permissive")
    pairs = table["pair"] if "pair" in table.column_names else None
    return Labelled(table["text"], table["label"], pairs, None, {})


def _beside_baseline(ours: Predictions, folder: Folder, texts: Labelled) -> dict[str, Any]:
    """The scores of a linear model that was fitted for the same outputs; {} without one."""
    from raybert.tasks.linear.baseline import beside_baseline
    from raybert.tasks.linear.store import load_baseline  # imports scikit-learn

    fitted = load_baseline(folder)
    if fitted is None or fitted.task.labels != ours.task.labels:
        return {}
    return {"baseline": beside_baseline(ours, fitted, texts)}
