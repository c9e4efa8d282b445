"""Bulk prediction: a source's texts through the classifier, on Ray Data.

Files are streamed, actors hold the model, and results keep the order of the source, so that memory
does not grow with the number of texts.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.cluster.machine import cores
from raybert.data.corpus import tokenize_job
from raybert.data.sources import documents
from raybert.data.sources.settings import SourceConfig
from raybert.errors import DataError
from raybert.inference.classifier import TextClassifier, softmax
from raybert.inference.prediction_file import PredictionWriter
from raybert.model import huggingface
from raybert.storage.folder import Folder

_BLOCK_BYTES = 1 << 20  # of Ray Data's blocks
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
    updated. With `labels` every row must have one. `workers` actors hold the classifier in `model`,
    in a precision as in `TextClassifier`.

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
            num_cpus=0,  # mostly waits for its file
            compute=TaskPoolStrategy(size=min(workers, len(shards))),
        )
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
    """Write a source's predictions to the file `output`, as in `PredictionWriter`.

    The arguments are those of `score`; `names` are the classifier's labels, and `on_progress` gets
    the number of texts so far.

    Returns:
        texts: how many were written; skipped: rows by reason; output.

    Raises:
        DataError: a bad row, an unreadable file, or no text at all.
        UserError, StorageError: as `PredictionWriter`.
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
