"""Score a source with a classifier on Ray Data: bulk prediction into a file, and evaluation.

Files are streamed, actors hold the model, and results keep the order of the source, so that memory
does not grow with the number of texts.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.cluster.internals.data import ordered_execution
from raybert.cluster.machine import cores
from raybert.data.corpus.tokenize_job import read_dataset
from raybert.data.sources import documents
from raybert.data.sources.row_table import accept
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError, StorageError, UserError
from raybert.inference.classifier import TextClassifier, softmax
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.tasks.classification import classification_scores

_BLOCK_BYTES = 1 << 20  # of Ray Data's blocks
_WRONG_EXAMPLES, _RIGHT_EXAMPLES = 8, 4  # for the report, the most confident ones
_ROWS_PER_CALL = 512  # enough texts to sort by length, few enough to show progress


class _Scorer:
    """An actor's classifier: adds the column `logits` to tables of texts."""

    def __init__(self, model: str, threads: int, precision: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._classifier = TextClassifier(Folder(model), precision=precision)

    def __call__(self, table: pa.Table) -> pa.Table:
        # A bad row is scored as an empty text; `score` drops it, or raises, in the source's order.
        logits = self._classifier.logits([text or "" for text in table["text"].to_pylist()])
        flat = pa.array(logits.ravel())
        scores = pa.FixedSizeListArray.from_arrays(flat, logits.shape[1])
        return table.append_column("logits", scores)


def score(
    source: SourceConfig,
    model: Folder,
    *,
    labels: bool,
    workers: int,
    skipped: Counter[str],
    precision: str = "auto",
) -> Iterator[pa.Table]:
    """Yield tables of text, label, row and logits [labels] in the order of the source.

    `row` counts all rows of the source from 0, skipped ones included; `skipped`, by reason, is
    updated. With `labels` every row must have one. `workers` actors hold the classifier in `model`.
    A DataError for the first bad row, or an unreadable file.
    """
    from ray.data import ActorPoolStrategy

    shards = documents.shards(source, labels=labels)
    left, rows = source.limit, 0
    with ordered_execution(_BLOCK_BYTES):
        texts = read_dataset(source, shards, readers=workers, labels=labels)
        with warnings.catch_warnings():
            # Ray 2.60 deprecates `max_restarts` here, and has no named parameter for it yet.
            warnings.simplefilter("ignore")
            scored = texts.map_batches(
                _Scorer,
                fn_constructor_args=(model.uri, max(1, cores() // workers), precision),
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


def logits_of(table: pa.Table) -> npt.NDArray[np.float32]:
    """The logits column as [n, labels]."""
    column = table["logits"].combine_chunks()
    return np.asarray(column.flatten().to_numpy().reshape(len(table), -1), np.float32)


def predict_source(
    source: SourceConfig,
    model: Folder,
    output: str,
    names: list[str],
    *,
    workers: int,
    on_progress: Callable[[int], None],
    precision: str = "auto",
) -> dict[str, Any]:
    """Write a source's predictions to the file `output`; return the counts.

    `names` are the classifier's labels; `on_progress` gets the number of texts so far. A DataError
    as in `score`, and if there is no text at all.
    """
    skipped: Counter[str] = Counter()
    done, temperature = 0, np.float32(huggingface.read_temperature(model))
    scored = score(
        source, model, labels=False, workers=workers, skipped=skipped, precision=precision
    )
    with PredictionWriter(output, names) as writer:
        for table in scored:
            rows, texts = table["row"].to_pylist(), table["text"].to_pylist()
            writer.write(rows, texts, softmax(logits_of(table) / temperature))
            done += len(table)
            on_progress(done)
        if not done:
            raise DataError(f"{source.path}: no texts")
    return {"texts": done, "skipped": dict(skipped), "output": output}


class PredictionWriter:
    """Writes predictions to a JSONL or Parquet file, which exists only once it is complete."""

    def __init__(self, path: str, names: list[str]) -> None:
        """Open a .jsonl or .parquet path or URI (else a UserError), for a classifier's labels."""
        self._folder, self._name = Folder.of_file(path)
        if not self._name.endswith((".jsonl", ".parquet")):
            raise UserError(f"--output {path}: name a .jsonl or a .parquet file")
        self._names = names
        self._unfinished = self._folder.join(f".{self._name}.unfinished")
        try:
            if self._folder.is_local:
                os.makedirs(self._folder.path, exist_ok=True)
            # On an object store a file exists once it is closed: it needs no temporary name.
            target = self._unfinished if self._folder.is_local else self._folder.join(self._name)
            self._stream = self._folder.filesystem.open_output_stream(target)
        except OSError as error:
            raise UserError(
                f"--output {path}: can't be written: {error.strerror or error}"
            ) from None
        self._parquet: pq.ParquetWriter | None = None

    def write(
        self, rows: list[int], texts: list[str], probabilities: npt.NDArray[np.float32]
    ) -> None:
        """Append texts with row number, best label, its score and all labels' scores."""
        best = probabilities.argmax(axis=1)
        records = [
            {
                "row": row,
                "text": text,
                "label": self._names[top],
                "score": float(scores[top]),
                "scores": {n: float(s) for n, s in zip(self._names, scores, strict=True)},
            }
            for row, text, top, scores in zip(rows, texts, best, probabilities, strict=True)
        ]
        with self._folder.storage_errors("writing", self._folder.join(self._name)):
            if self._name.endswith(".jsonl"):
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
                self._stream.write(lines.encode())
                return
            table = pa.Table.from_pylist(records)
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(self._stream, table.schema)
            self._parquet.write_table(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Complete the file; after an error, remove it."""
        if kind is not None:
            with suppress(OSError, StorageError):
                self._close()
                if not self._folder.is_local:  # closing has created it
                    self._folder.delete(self._name)
            if self._folder.is_local:
                self._folder.delete(f".{self._name}.unfinished")
            return
        with self._folder.storage_errors("writing", self._folder.join(self._name)):
            self._close()
            if self._folder.is_local:
                os.replace(self._unfinished, self._folder.join(self._name))

    def _close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        self._stream.close()


def evaluate(
    source: SourceConfig,
    model: Folder,
    names: list[str],
    *,
    workers: int,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Score labelled texts with the classifier in `model`, whose labels are `names`.

    `on_progress` gets the number of texts so far. Returns `classification_scores`, with
    `texts_per_second`, `skipped` and `examples`. A DataError as in `score`.
    """
    # The model's own preprocessing, as in training and in serving.
    breaks = huggingface.read_preprocessing(model).get("html_breaks", "space")
    source = source.model_copy(update={"labels": names, "html_breaks": breaks})
    skipped: Counter[str] = Counter()
    begun, tables, done = time.monotonic(), [], 0
    for table in score(source, model, labels=True, workers=workers, skipped=skipped):
        tables.append(table)
        done += len(table)
        on_progress(done)
    if not tables:
        raise DataError(f"{source.path}: no labelled texts")
    table = pa.concat_tables(tables)
    logits = np.concatenate([logits_of(part) for part in tables])
    # Calibrated, as in serving.
    logits = np.asarray(logits / huggingface.read_temperature(model), np.float32)
    ids = {name: index for index, name in enumerate(names)}
    labels = np.array([ids[name] for name in table["label"].to_pylist()])
    return {
        **classification_scores(logits, labels, names),
        "texts_per_second": round(done / max(1e-9, time.monotonic() - begun), 1),
        "skipped": dict(skipped),
        "examples": _examples(table, softmax(logits), labels, names),
    }


def _examples(table: pa.Table, probabilities: Any, labels: Any, names: list[str]) -> list[Any]:
    """The most confident wrong and right predictions, as the report shows them."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    right = np.flatnonzero(predicted == labels)
    chosen = [
        *wrong[np.argsort(-confidence[wrong])][:_WRONG_EXAMPLES],
        *right[np.argsort(-confidence[right])][:_RIGHT_EXAMPLES],
    ]
    return [
        {
            "text": table["text"][int(row)].as_py()[:1000],
            "label": names[labels[row]],
            "predicted": names[predicted[row]],
            "probability": round(float(confidence[row]), 4),
        }
        for row in chosen
    ]
