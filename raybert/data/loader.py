"""Masked micro-batches for a rank, step by step: in this process, or from Ray Data operators.

One Ray Data execution serves a run. Its items are ranges of steps that each read one window of the
order. An operator on any CPU of the cluster reads the rows of the rank's micro-batches in such a
range and masks them; the blocks come back in order. The first step of a resumed run and the number
of workers only decide which items there are.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.cluster.internals.data import ordered_execution, throttle
from raybert.data.corpus.parts import PartReader, Rows
from raybert.data.masking import IGNORE_INDEX, MaskingConfig, Vocabulary, mask_rows
from raybert.data.order import CorpusOrder
from raybert.errors import RaybertError

# Ray Data keeps finished blocks in the object store. 8 MiB are a few hundred steps of a small model
# and a few of a large one: they hide the latency of a read, and take little of the store.
BLOCK_BYTES = 8 << 20
_MAX_TASKS = 1024  # bounds Ray's bookkeeping: in a longer run, a task masks several windows


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one micro-batch of a step, masked."""

    step: int
    micro_batch_index: int
    row_ids: npt.NDArray[np.int64]  # [n]
    input_ids: npt.NDArray[np.int32]  # [n, T]
    labels: npt.NDArray[np.int32]  # [n, T]

    @property
    def count(self) -> int:
        """Predicted tokens."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return int(self.input_ids.size)

    def digest(self) -> str:
        """A hash of step, micro-batch index, row ids, inputs and labels."""
        return digest(self.step, self.micro_batch_index, self.row_ids, self.input_ids, self.labels)

    def split(self, rows: int) -> Sequence[MicroBatch]:
        """The same rows in batches of at most `rows`; itself where it has no more."""
        if len(self.row_ids) <= rows:
            return [self]
        return [
            replace(
                self,
                row_ids=self.row_ids[part],
                input_ids=self.input_ids[part],
                labels=self.labels[part],
            )
            for part in parts_of(len(self.row_ids), rows)
        ]


def parts_of(count: int, most: int) -> list[slice]:
    """Slices of at most `most` of `count` rows."""
    return [slice(begin, begin + most) for begin in range(0, count, most)]


def digest(step: int, index: int, *arrays: npt.NDArray[Any]) -> str:
    """A hash of a micro-batch's step, index and content: 32 hexadecimal digits."""
    state = hashlib.sha256(np.array([step, index], np.int64).tobytes())
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:32]


@dataclass(frozen=True)
class BatchPlan:
    """Everything that the batches of a run depend on. Picklable: Ray Data's operators get it."""

    reader: PartReader
    order: CorpusOrder
    masking: MaskingConfig
    vocabulary: Vocabulary
    total_steps: int  # a changing mask rate reaches its end value here

    def micro_batches(self, indices: Sequence[int], steps: range) -> Iterator[list[MicroBatch]]:
        """Yield each step's micro-batches of these indices; empty ones are left out."""
        for part in self.order.split_at_windows(steps):
            yield from self._in_window(indices, part)

    def _in_window(self, indices: Sequence[int], steps: range) -> Iterator[list[MicroBatch]]:
        # The rows of all steps that share a window are read at once.
        epoch, _ = self.order.window_of(steps.start)
        row_ids = [self.order.micro_batches(steps, index) for index in indices]
        rows = [self.reader.read_rows(np.concatenate(ids)) for ids in row_ids]
        size = self.order.micro_batch_size
        for number, step in enumerate(steps):
            at = slice(number * size, (number + 1) * size)
            counts = [len(of_index[number]) for of_index in row_ids]
            if not any(counts):
                yield []
                continue
            ids = np.concatenate([of_index[number] for of_index in row_ids])
            inputs, labels = mask_rows(
                Rows(
                    np.concatenate([r.input_ids[at] for r in rows]),
                    np.concatenate([r.word_starts[at] for r in rows]),
                ),
                ids,
                epoch,
                self.masking.rate(step / max(1, self.total_steps)),
                config=self.masking,
                vocabulary=self.vocabulary,
                seed=self.order.seed,
            )
            ends = np.cumsum(counts)
            yield [
                MicroBatch(step, index, ids[a:b], inputs[a:b], labels[a:b])
                for index, a, b in zip(indices, ends - counts, ends, strict=True)
                if b > a
            ]


def ray_micro_batches(
    plan: BatchPlan, indices: Sequence[int], steps: range, *, cpus: float, memory: int
) -> Iterator[list[MicroBatch]]:
    """Yield what `plan.micro_batches` yields, computed by Ray Data on the cluster's CPUs.

    The execution may use `cpus` logical CPUs, also less than one, and its blocks `memory` bytes of
    the object store. A RaybertError if micro-batches are missing, come twice or out of order.
    """
    import ray
    from ray.data import ExecutionResources

    items = [{"begin": s.start, "end": s.stop} for s in plan.order.split_at_windows(steps)]
    limits = ExecutionResources(cpu=cpus, object_store_memory=memory)
    with ordered_execution(BLOCK_BYTES) as context:
        throttle(context)
        context.execution_options.resource_limits = limits
        # Not `ray.data.range`: it reads in tasks of its own, hundreds before the first steps.
        dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MAX_TASKS))
        dataset = dataset.map_batches(
            _mask_steps,
            fn_args=(plan, list(indices)),
            batch_size=1,
            batch_format="numpy",
            num_cpus=min(1.0, math.floor(cpus * 1e4) / 1e4),  # Ray counts CPUs in units of 1e-4
        )
        blocks = dataset.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow")
        yield from _by_step(_from_tables(blocks), plan.order, indices, steps)


def _mask_steps(
    items: dict[str, npt.NDArray[np.int64]], plan: BatchPlan, indices: list[int]
) -> Iterator[pa.Table]:
    """The operator: ranges of steps in, tables of the masked rows of several complete steps out."""
    for begin, end in zip(items["begin"], items["end"], strict=True):
        pending: list[MicroBatch] = []
        size = 0
        for step in plan.micro_batches(indices, range(int(begin), int(end))):
            pending += step
            size += sum(batch.input_ids.nbytes + batch.labels.nbytes for batch in step)
            if size >= BLOCK_BYTES // 2:
                yield _to_table(pending)
                pending, size = [], 0
        if pending:
            yield _to_table(pending)


def _to_table(batches: list[MicroBatch]) -> pa.Table:
    """Put micro-batches into a table, one per row, so that no block holds a part of one."""

    def lists(arrays: list[npt.NDArray[Any]]) -> pa.Array:
        offsets = np.cumsum([0, *(array.size for array in arrays)]).astype(np.int32)
        values = np.concatenate([array.ravel() for array in arrays])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    return pa.table(
        {
            "step": [batch.step for batch in batches],
            "index": [batch.micro_batch_index for batch in batches],
            "row_ids": lists([batch.row_ids for batch in batches]),
            "input_ids": lists([batch.input_ids for batch in batches]),
            "labels": lists([batch.labels for batch in batches]),
        }
    )


def _from_tables(tables: Iterable[pa.Table]) -> Iterator[MicroBatch]:
    """Yield the micro-batches of tables that `_to_table` made."""
    for table in tables:
        for number in range(len(table)):
            step, index = table["step"][number].as_py(), table["index"][number].as_py()
            row_ids, input_ids, labels = (
                table[name][number].values.to_numpy() for name in ("row_ids", "input_ids", "labels")
            )
            shape = len(row_ids), -1
            yield MicroBatch(step, index, row_ids, input_ids.reshape(shape), labels.reshape(shape))


def _by_step(
    received: Iterator[MicroBatch], order: CorpusOrder, indices: Sequence[int], steps: range
) -> Iterator[list[MicroBatch]]:
    """Yield one list of micro-batches for every step, empty where the rank has no row in it."""
    for step in steps:
        expected = [(step, index) for index in order.indices_with_rows(step, indices)]
        batches = list(itertools.islice(received, len(expected)))
        found = [(batch.step, batch.micro_batch_index) for batch in batches]
        if found != expected:
            raise RaybertError(
                f"Ray Data returned the micro-batches (step, index) {found}, expected {expected}; "
                "run the command again to continue from the last checkpoint"
            )
        yield batches
