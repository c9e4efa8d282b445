"""Tokenize texts in memory: in Ray Data if Ray is initialized, otherwise in this process."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import pyarrow as pa

from raybert.data.preprocess import Preprocessing
from raybert.data.tokenizer import Tokenizer

_BATCH_TEXTS = 1000


def tokenize(
    texts: pa.ChunkedArray, tokenizer: Tokenizer, how: Preprocessing
) -> list[npt.NDArray[Any]]:
    """Turn texts into ids, one array per text, in their order."""
    import ray

    if not ray.is_initialized() or len(texts) < 2 * _BATCH_TEXTS:
        return how.encode(tokenizer, texts.to_pylist())
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    with DataContext.current(context):
        # The read tasks contain their rows, so no block waits in the object store.
        tables = [
            pa.table({"text": texts.slice(begin, _BATCH_TEXTS).combine_chunks()})
            for begin in range(0, len(texts), _BATCH_TEXTS)
        ]
        dataset = ray.data.from_arrow(tables).map_batches(
            _encode, fn_args=(tokenizer, how), batch_size=None, batch_format="pyarrow"
        )
        return [
            ids.values.to_numpy()
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow")
            for column in table["input_ids"].chunks
            for ids in column
        ]


def _encode(table: pa.Table, tokenizer: Tokenizer, how: Preprocessing) -> pa.Table:
    rows = how.encode(tokenizer, table["text"].to_pylist())
    return pa.table({"input_ids": pa.array(rows, pa.list_(pa.uint32()))})
