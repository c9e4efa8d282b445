"""Read and tokenize a source on any CPU of the cluster, as one Ray Data job.

The functions given to `map_batches` are in this module, which every worker can import. An error in
the user's data is a row in its place in the order. The consumer, which reads in order, raises it:
so the user sees the first error for any number of workers.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raybert.cluster.internals.data import ordered_execution
from raybert.data.corpus.settings import CorpusConfig
from raybert.data.keyed import text_digest
from raybert.data.sources.documents import read, sampled_shards
from raybert.data.sources.files import Shard
from raybert.data.sources.row_table import LabelParser, schema_of
from raybert.data.sources.settings import SourceConfig
from raybert.data.tokenizer import Tokenizer
from raybert.data.unknown import unknown_characters
from raybert.errors import RaybertError

_BLOCK_BYTES = 2 << 20  # of text or ids between operators
_TOKENIZERS_PER_READER = 4
_MIN_STORE_BYTES = 96 << 20  # of the object store, for blocks between operators
_STORE_BYTES_PER_CPU = 16 << 20

_tokenizers: dict[str, Tokenizer] = {}  # the last one that this process used, by its hash


def tokenized_blocks(
    config: CorpusConfig, tokenizer: Tokenizer, skipped: Counter[str]
) -> Iterator[pa.Table]:
    """Run the Ray Data job; yield the tables of `tokenize` in the order of the source.

    Rows that were found to be bad while a sample was drawn are counted in `skipped`.
    """
    import ray

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    found = sampled_shards(config.source, skipped=skipped)
    readers = math.ceil(cpus / _TOKENIZERS_PER_READER)
    store_bytes = max(_MIN_STORE_BYTES, cpus * _STORE_BYTES_PER_CPU)
    with ordered_execution(_BLOCK_BYTES) as context:
        options = context.execution_options
        options.resource_limits = options.resource_limits.copy(object_store_memory=store_bytes)
        tokenized = read_dataset(config.source, found, readers=readers, labels=None).map_batches(
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


def read_dataset(
    config: SourceConfig, shards: Sequence[Shard], *, readers: int, labels: LabelParser | None
) -> Any:
    """A Ray Data set of a source's rows, tables of `schema_of` in order."""
    import ray.data

    blocks = [pa.table({"shard": pa.array([pickle.dumps(s)], pa.binary())}) for s in shards]
    return ray.data.from_arrow(blocks).map_batches(
        _read_rows,
        fn_kwargs={"config": config, "labels": labels},
        batch_format="pyarrow",
        # Reading is cheap, and must not be fused with the work after it: an archive is one task.
        # Readers take no CPU: on one CPU, a task that waits for its reader would wait forever.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=min(readers, len(shards))),
    )


def _read_rows(
    batch: pa.Table, config: SourceConfig, labels: LabelParser | None
) -> Iterator[pa.Table]:
    """Read shards as `documents.read` does; an unreadable file is a last row without a place."""
    for pickled in batch.column("shard").to_pylist():
        try:
            yield from read(pickle.loads(pickled), config, labels=labels)
        except RaybertError as error:
            problem = {"problem": str(error)}
            yield pa.Table.from_pylist([problem], schema=schema_of(config))


def tokenize(batch: pa.Table, spec: Any, hash: str, seed: int) -> pa.Table:
    """Tokenize a table of `_read_rows`; compute digest and split hash of each, keyed by `seed`.

    `spec` is a reference to the pickled tokenizer, which a process fetches once and caches under
    `hash`. Returns the columns ids: list of uint16 or uint32, of bad rows those of an empty text;
    starts: list of bool (whether a word starts), null where the id alone determines it; digest:
    uint64, equal for texts that differ only in white space; split_hash: uint64, a uniform hash that
    selects held-out documents; chars: int64, of the text, and unknown_chars of them; problem and
    place.
    """
    tokenizer = _tokenizer(spec, hash)
    texts = batch.column("text").to_pylist()
    known = ["" if text is None else text for text in texts]
    ragged = tokenizer.encode(known)
    offsets = pa.array(ragged.offsets, pa.int32())
    starts = pa.nulls(len(texts), pa.list_(pa.bool_()))
    if tokenizer.starts_by_id is None:
        starts = pa.ListArray.from_arrays(offsets, pa.array(ragged.word_starts))
    words = np.frombuffer(b"".join(text_digest(text or "", seed) for text in texts), np.uint64)
    return pa.table(
        {
            "ids": pa.ListArray.from_arrays(offsets, pa.array(ragged.values)),
            "starts": starts,
            "digest": pa.array(words[::2]),
            "split_hash": pa.array(words[1::2]),
            "chars": pa.array([len(text) for text in known], pa.int64()),
            "unknown_chars": pa.array(unknown_characters(known, ragged, tokenizer)),
            "problem": batch.column("problem"),
            "place": batch.column("place"),
        }
    )


def _tokenizer(spec: Any, hash: str) -> Tokenizer:
    """The tokenizer of this process, built in its first task: parsing one takes 50 ms."""
    if hash not in _tokenizers:
        import ray

        # One thread per task: the tasks run in parallel.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _tokenizers.clear()
        _tokenizers[hash] = pickle.loads(ray.get(spec))
    return _tokenizers[hash]
