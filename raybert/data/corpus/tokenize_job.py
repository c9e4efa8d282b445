"""Read and tokenize a source on any CPU of the cluster, as one Ray Data job.

The functions given to `map_batches` are in this module, which every worker can import. Errors in
the user's data travel as rows, in their place in the order, and are raised by the consumer, which
reads in order: so the user sees the first error for any number of workers.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from raybert.data.corpus.settings import CorpusConfig
from raybert.data.sources.documents import read, shards
from raybert.data.sources.row_table import accept
from raybert.data.sources.settings import SourceConfig
from raybert.data.sources.shard import Shard
from raybert.data.text import text_digest
from raybert.data.tokenizer import Tokenizer
from raybert.errors import DataError, RaybertError

TEXT = pa.schema([("text", pa.string()), ("problem", pa.string()), ("place", pa.string())])
LABELLED = TEXT.insert(1, pa.field("label", pa.string()))

_BLOCK_BYTES = 2 << 20  # of text or ids between operators
_TOKENIZERS_PER_READER = 4
_MIN_STORE_BYTES = 96 << 20  # of the object store, for blocks between operators
_STORE_BYTES_PER_CPU = 16 << 20


def tokenized_blocks(config: CorpusConfig, tokenizer: Tokenizer) -> Iterator[pa.Table]:
    """Run the Ray Data job; yield the tables of `tokenize` in the order of the source."""
    import ray
    import ray.data
    from ray.data import DataContext, TaskPoolStrategy

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    found = shards(config.source)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(
        object_store_memory=max(_MIN_STORE_BYTES, cpus * _STORE_BYTES_PER_CPU)
    )
    readers = min(math.ceil(cpus / _TOKENIZERS_PER_READER), len(found))
    with DataContext.current(context):
        blocks = ray.data.from_arrow([shard_table(shard) for shard in found])
        texts = blocks.map_batches(
            read_shards,
            fn_kwargs={"config": config.source},
            batch_format="pyarrow",
            # Reading is cheap compared with tokenizing, and must not be fused with it: an archive
            # is one task. Readers take no CPU: on a cluster of one CPU, a tokenizer that waits for
            # its reader would wait forever.
            num_cpus=0,
            compute=TaskPoolStrategy(size=readers),
        )
        tokenized = texts.map_batches(
            tokenize,
            fn_kwargs={
                "spec": ray.put(pickle.dumps(tokenizer)),
                "hash": tokenizer.hash,
                "seed": config.seed,
            },
            batch_format="pyarrow",
            num_cpus=1,
        )
        yield from tokenized.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=1
        )


def shard_table(shard: Shard) -> pa.Table:
    """Pickle a shard into one row of a Ray Data block."""
    return pa.table({"shard": pa.array([pickle.dumps(shard)], pa.binary())})


def read_shards(batch: pa.Table, config: SourceConfig) -> Iterator[pa.Table]:
    """Read shards as tables of `TEXT`; an unreadable file becomes a last row without a place."""
    for table in read_rows(batch, config, labels=False):
        yield table.select(TEXT.names)


def read_rows(batch: pa.Table, config: SourceConfig, labels: bool) -> Iterator[pa.Table]:
    """Read shards as tables of `LABELLED`; the labels are null unless `labels` is set."""
    for pickled in batch.column("shard").to_pylist():
        try:
            for table in read(pickle.loads(pickled), config, labels=labels):
                yield table.select(LABELLED.names)
        except RaybertError as error:
            yield pa.table([[None], [None], [str(error)], [None]], schema=LABELLED)


def accept_rows(table: pa.Table, on_bad_row: str, skipped: Counter[str]) -> pa.Table:
    """Drop and count a table's bad rows, or raise for the first one.

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
    """Tokenize texts; compute a digest and a lot of each text.

    Args:
        batch: texts, a table of `TEXT`.
        spec: a reference to the pickled tokenizer, fetched once in each process.
        hash: the tokenizer's hash, under which the process caches it.
        seed: keys digest and lot.

    Returns:
        Columns ids: list of uint16 or uint32; starts: list of bool (whether a word starts), null
        where the id alone determines it; digest: uint64, equal for texts that differ only in white
        space; lot: uint64, uniform, for the choice of held-out documents; problem and place. The
        ids of bad rows are those of an empty text.
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
    """The tokenizer of this process, built in its first task: parsing one takes 50 ms."""
    kept = _cached(hash)
    if not kept:
        import ray

        # One thread per task: the tasks run in parallel.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        kept.append(pickle.loads(ray.get(spec)))
    return kept[0]
