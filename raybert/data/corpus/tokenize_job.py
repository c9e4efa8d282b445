"""What runs on the cluster to make a corpus: reading shards, and tokenizing what they hold.

Functions of Ray Data's `map_batches`, in a module that any worker can import. What goes wrong with
the user's data travels as a row, in its place in the order, and is raised by who reads in order:
so the first mistake is the one that is told, however many workers met one.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from raybert.data.sources.documents import read
from raybert.data.sources.row_table import accept
from raybert.data.sources.shard import Shard
from raybert.data.sources.source_config import SourceConfig
from raybert.data.text import text_digest
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DataError, RaybertError

TEXT = pa.schema([("text", pa.string()), ("problem", pa.string()), ("place", pa.string())])
LABELLED = TEXT.insert(1, pa.field("label", pa.string()))


def shard_table(shard: Shard) -> pa.Table:
    """A shard as one row of a Ray Data block."""
    return pa.table({"shard": pa.array([pickle.dumps(shard)], pa.binary())})


def read_shards(batch: pa.Table, config: SourceConfig) -> Iterator[pa.Table]:
    """Read shards as tables of schema `TEXT`; an unreadable file is a last row without place."""
    for table in read_rows(batch, config, labels=False):
        yield table.select(TEXT.names)


def read_rows(batch: pa.Table, config: SourceConfig, labels: bool) -> Iterator[pa.Table]:
    """Read shards as tables of schema `LABELLED`; the labels are null unless asked for."""
    for pickled in batch.column("shard").to_pylist():
        try:
            for table in read(pickle.loads(pickled), config, labels=labels):
                yield table.select(LABELLED.names)
        except RaybertError as error:
            yield pa.table([[None], [None], [str(error)], [None]], schema=LABELLED)


def accept_rows(table: pa.Table, on_bad_row: str, skipped: Counter[str]) -> pa.Table:
    """Drop and count a table's bad rows, or raise for the first one, in order.

    Raises:
        DataError: a bad row with `on_bad_row: fail`, or an unreadable file.
    """
    fatal = pa.compute.and_(table["problem"].is_valid(), table["place"].is_null())
    if pa.compute.any(fatal).as_py():
        at = pa.compute.index(fatal, True).as_py()
        accept(table.slice(0, at), on_bad_row, skipped)
        raise DataError(table["problem"][at].as_py())
    return accept(table, on_bad_row, skipped)


def tokenize(batch: pa.Table, spec: Any, hash: str, seed: int) -> pa.Table:
    """Tokenize texts, and draw for each a digest and a lot.

    Args:
        batch: of schema `TEXT`.
        spec: a reference to the pickled tokenizer; fetched once a process.
        hash: the tokenizer's, under which the process keeps it.
        seed: keys digest and lot.

    Returns:
        Columns ids: list of uint16 or uint32; starts: list of bool, null where the tokenizer tells
        by the id alone; digest: uint64, equal for texts that differ in white space at most; lot:
        uint64, uniform; problem and place. Bad rows have no ids.
    """
    tokenizer = _tokenizer(spec, hash)
    texts = batch.column("text").to_pylist()
    ragged = tokenizer.encode(["" if text is None else text for text in texts])
    offsets = pa.array(ragged.offsets, pa.int32())
    starts = pa.nulls(len(texts), pa.list_(pa.bool_()))
    if tokenizer.starts_by_id is None:
        starts = pa.ListArray.from_arrays(offsets, pa.array(ragged.word_starts))
    drawn = np.frombuffer(b"".join(text_digest(text or "", seed) for text in texts), np.uint64)
    return pa.table(
        {
            "ids": pa.ListArray.from_arrays(offsets, pa.array(ragged.values)),
            "starts": starts,
            "digest": pa.array(drawn[::2]),
            "lot": pa.array(drawn[1::2]),
            "problem": batch.column("problem"),
            "place": batch.column("place"),
        }
    )


@lru_cache(maxsize=2)
def _cached(hash: str) -> list[Tokenizer]:
    return []


def _tokenizer(spec: Any, hash: str) -> Tokenizer:
    """The tokenizer of this process, made at the first task: parsing one takes 50 ms."""
    kept = _cached(hash)
    if not kept:
        import ray

        # One thread a task: the tasks themselves are what is parallel.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        kept.append(pickle.loads(ray.get(spec)))
    return kept[0]
