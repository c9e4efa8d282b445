"""The outputs of a model for evaluated texts, in a file: two models are compared by them later.

Texts themselves are not stored, only their hashes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raybert.data.keyed import U64, text_hash
from raybert.errors import damaged_file
from raybert.storage.folder import Folder
from raybert.tasks.comparison import Predictions
from raybert.tasks.labelled import Labelled, units_of
from raybert.tasks.protocol import Outputs, Targets
from raybert.tasks.registry import TASKS

FILE = "scored.parquet"
_MOST_ROWS = 200_000
_META = b"raybert"


class ScoredTexts(NamedTuple):
    """What `save` stored."""

    texts: U64  # hashes, [n]
    predictions: Predictions


def save(folder: Folder, texts: Labelled, found: Predictions) -> None:
    """Write the outputs and targets of texts, of the first 200,000."""
    first = np.arange(min(_MOST_ROWS, len(texts.texts)))
    hashes = [text_hash(unit, 0) for unit in units_of(texts.take(first), by_text=True)]
    count, task = len(first), found.task
    table = pa.table(
        {
            "text": pa.array(hashes, pa.uint64()),
            "outputs": ragged(found.outputs[:count]),
            "targets": ragged([np.atleast_1d(row) for row in found.targets[:count]]),
        }
    )
    meta = {"task": task.name, "labels": task.labels, "fitted": dict(task.fitted)}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_META: json.dumps(meta)}), sink)
    folder.write_bytes(FILE, sink.getvalue())


def load(folder: Folder) -> ScoredTexts | None:
    """Read what `save` wrote; None: nothing, or a task that is not registered here.

    Raises:
        DamagedError: the file is damaged.
    """
    if not folder.exists(FILE):
        return None
    with damaged_file(folder.join(FILE)):
        table = pq.read_table(io.BytesIO(folder.read_bytes(FILE)))
        meta = json.loads(table.schema.metadata[_META])
        if meta["task"] not in TASKS:
            return None
        task = TASKS[meta["task"]](meta["labels"], meta["fitted"])
        outputs, targets = stacked(
            rows_of([table], "outputs"),
            rows_of([table], "targets"),
            len(task.labels),
            per_token=task.is_per_token,
        )
        return ScoredTexts(table["text"].to_numpy(), Predictions(task, outputs, targets))


def ragged(rows: Outputs | Targets) -> pa.Array:
    """A column of arrays of any shape, flattened."""
    offsets = np.cumsum([0, *(row.size for row in rows)]).astype(np.int32)
    flat = np.concatenate([row.ravel() for row in rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def rows_of(tables: Sequence[pa.Table], column: str) -> list[npt.NDArray[Any]]:
    """The arrays of a column that `ragged` made."""
    return [row.values.to_numpy() for t in tables for c in t[column].chunks for row in c]


def stacked(
    outputs: list[npt.NDArray[Any]],
    targets: list[npt.NDArray[Any]],
    num_labels: int,
    *,
    per_token: bool,
) -> tuple[Outputs, Targets]:
    """Flattened outputs and targets of each text in the shapes that tasks have them."""
    if per_token:
        return [row.reshape(-1, num_labels) for row in outputs], targets
    of_texts = np.stack(targets)
    is_class = np.issubdtype(of_texts.dtype, np.integer)
    return np.stack(outputs), of_texts[:, 0] if is_class else of_texts
