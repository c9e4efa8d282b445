"""Answers in bulk: texts of any source through the classifier, on Ray Data.

Reading streams, models sit in actors, results come back in the order of the source: files of
millions of texts pass through bounded memory.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.cluster.machine import cores
from raybert.data.corpus import tokenize_job
from raybert.data.sources import documents
from raybert.data.sources.documents import SourceConfig
from raybert.errors import DataError, StorageError, UserError
from raybert.inference.classifier import TextClassifier, softmax
from raybert.model import huggingface
from raybert.storage.folder import Folder

_BLOCK_BYTES = 1 << 20  # of text: what an actor takes at a time
_ROWS_A_CALL = 512  # enough texts to sort by length, few enough to show progress


class _Scorer:
    """The classifier in an actor."""

    def __init__(self, model: str, threads: int, precision: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._classifier = TextClassifier(Folder(model), precision=precision)

    def __call__(self, table: pa.Table) -> pa.Table:
        # A bad row is scored as an empty text: who reads in order drops it or stops at it.
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

    `row` is the number from 0 among all rows of the source, those left out included.

    Args:
        source: what to score.
        model: a classifier's `model/` directory.
        labels: whether every row must have a label.
        workers: how many actors score.
        skipped: is given the number of rows left out, by reason.
        precision: as in `TextClassifier`.

    Raises:
        DataError: the first bad row, or an unreadable file.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    shards = documents.shards(source, labels=labels)
    left, rows = source.limit, 0
    with DataContext.current(context):
        texts = ray.data.from_arrow(
            [tokenize_job.shard_table(shard) for shard in shards]
        ).map_batches(
            tokenize_job.read_rows,
            fn_kwargs={"config": source, "labels": labels},
            batch_format="pyarrow",
            num_cpus=0,  # waits for its file most of the time
            compute=TaskPoolStrategy(size=min(workers, len(shards))),
        )
        with warnings.catch_warnings():
            # Ray 2.60 deprecates `max_restarts` here, and has no named parameter for it yet.
            warnings.simplefilter("ignore")
            scored = texts.map_batches(
                _Scorer,
                fn_constructor_args=(model.uri, max(1, cores() // workers), precision),
                batch_size=_ROWS_A_CALL,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
                num_cpus=1,
                max_restarts=0,  # a lost actor ends the command, which is short
            )
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            table = table.append_column("row", pa.array(range(rows, rows + len(table))))
            rows += len(table)
            good = tokenize_job.accept_rows(table, source.on_bad_row, skipped).slice(0, left)
            left = None if left is None else left - len(good)
            if len(good):
                yield good
            if left == 0:
                return


def logits_of(table: pa.Table) -> npt.NDArray[np.float32]:
    """The logits column as [n, labels]."""
    column = table["logits"].combine_chunks()
    return np.asarray(column.flatten().to_numpy().reshape(len(table), -1), np.float32)


class PredictionWriter:
    """Writes predictions to one file, JSONL or Parquet by its name; it appears when complete."""

    def __init__(self, path: str, names: list[str]) -> None:
        """Open `path` for the predictions of a classifier with these labels.

        Raises:
            UserError: the name ends in neither, or the folder can't be written.
        """
        self._folder, self._name = Folder.of_file(path)
        if not self._name.endswith((".jsonl", ".parquet")):
            raise UserError(f"--output {path}: name a .jsonl or a .parquet file")
        self._names = names
        self._unfinished = self._folder.join(f".{self._name}.unfinished")
        try:
            if self._folder.is_local:
                os.makedirs(self._folder.path, exist_ok=True)
            # An object store shows a file only once it is closed: no need for another name.
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
        """Write texts with the row numbers, their label, its probability and every label's.

        Raises:
            StorageError: the disk is full.
        """
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
        if self._name.endswith(".jsonl"):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
            with self._folder.storage_errors("writing", self._folder.join(self._name)):
                self._stream.write(lines.encode())
            return
        table = pa.Table.from_pylist(records)
        with self._folder.storage_errors("writing", self._folder.join(self._name)):
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(self._stream, table.schema)
            self._parquet.write_table(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Finish the file, or leave none after an error."""
        if kind is not None:
            with suppress(OSError, StorageError):
                if self._parquet is not None:
                    self._parquet.close()
                self._stream.close()
                if not self._folder.is_local:  # closing it has made it appear
                    self._folder.delete(self._name)
            if self._folder.is_local:
                self._folder.delete(f".{self._name}.unfinished")
            return
        with self._folder.storage_errors("writing", self._folder.join(self._name)):
            if self._parquet is not None:
                self._parquet.close()
            self._stream.close()
            if self._folder.is_local:
                os.replace(self._unfinished, self._folder.join(self._name))


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
    """Score a source into a file; returns the number of texts, and of rows left out by reason."""
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
