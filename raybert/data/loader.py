"""Masked micro-batches for a rank, step by step: in this process, or from Ray Data operators.

One Ray Data execution serves a whole run. Its items are windows of steps; an operator on any CPU of
the cluster reads the windows of the rank's slots and masks them; the blocks come back in order.
Where a run resumes, and with how many workers, only decides which items there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.data.corpus.parts import PartReader, Rows
from raybert.data.masking import IGNORE_INDEX, MaskingConfig, Vocabulary, mask_rows
from raybert.data.order import Order
from raybert.errors import RaybertError

# Ray Data holds finished blocks in the object store. 8 MiB are a few hundred steps of a small
# model and a few of a large one: they hide a read, and no run needs much of the store.
BLOCK_BYTES = 8 << 20
_MOST_TASKS = 1024  # they keep the bookkeeping flat: a longer run has more windows in each


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one slot in one step."""

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
        """A hash over step, slot, row ids, inputs and labels: equal for equal batches only."""
        return digest(self.step, self.micro_batch_index, self.row_ids, self.input_ids, self.labels)


def digest(step: int, slot: int, *arrays: npt.NDArray[Any]) -> str:
    """A hash of a micro-batch's place and content, 32 hexadecimal digits."""
    state = hashlib.sha256(np.array([step, slot], np.int64).tobytes())
    for array in arrays:
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:32]


@dataclass(frozen=True)
class BatchPlan:
    """Everything that decides a run's batches. Picklable: it is what travels to the operators."""

    reader: PartReader
    order: Order
    masking: MaskingConfig
    vocabulary: Vocabulary
    total_steps: int  # a falling mask rate ends here

    def micro_batches(self, slots: Sequence[int], steps: range) -> Iterator[list[MicroBatch]]:
        """Yield each step's micro-batches of these slots; empty ones are left out."""
        step = steps.start
        while step < steps.stop:
            epoch, window = self.order.window_of(step)
            span = self.order.steps_of(epoch, window)
            last = min(span.stop, steps.stop)
            yield from self._window(slots, epoch, window, range(step, last))
            step = last

    def _window(
        self, slots: Sequence[int], epoch: int, window: int, steps: range
    ) -> Iterator[list[MicroBatch]]:
        """Yield the steps of one window; its rows are read once."""
        size = self.order.micro_batch_size
        first = self.order.steps_of(epoch, window).start
        cut = slice((steps.start - first) * size, (steps.stop - first) * size)
        row_ids = [self.order.window(epoch, window, slot)[cut] for slot in slots]
        rows = [self.reader.read_rows(ids) for ids in row_ids]
        for step in steps:
            at = slice((step - steps.start) * size, (step - steps.start + 1) * size)
            counts = [len(ids[at]) for ids in row_ids]
            if not any(counts):
                yield []
                continue
            together = Rows(
                np.concatenate([r.input_ids[at] for r in rows]),
                np.concatenate([r.word_starts[at] for r in rows]),
            )
            ids = np.concatenate([ids[at] for ids in row_ids])
            inputs, labels = mask_rows(
                together,
                ids,
                np.full(len(ids), epoch),
                np.full(len(ids), self.masking.rate(step / max(1, self.total_steps))),
                config=self.masking,
                vocabulary=self.vocabulary,
                seed=self.order.seed,
            )
            ends = np.cumsum(counts)
            yield [
                MicroBatch(step, slot, ids[a:b], inputs[a:b], labels[a:b])
                for slot, a, b in zip(slots, ends - counts, ends, strict=True)
                if b > a
            ]


def ray_micro_batches(
    plan: BatchPlan, slots: Sequence[int], steps: range, *, cpus: float, memory: int
) -> Iterator[list[MicroBatch]]:
    """Yield what `plan.micro_batches` yields, made by Ray Data on the cluster's CPUs.

    Args:
        plan: the run's plan.
        slots: this rank's slots.
        steps: the steps to make, from anywhere.
        cpus: logical CPUs that this execution may use, a part of one where they are few.
        memory: bytes of the object store that its blocks may fill.
    """
    import ray
    from ray.data import DataContext, ExecutionResources

    from raybert.cluster.internals.data import throttle

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    throttle(context)
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(
        cpu=cpus, object_store_memory=memory
    )
    windows = _count_windows(plan.order, steps)
    with DataContext.current(context):
        # Not `ray.data.range`: it reads in tasks of its own, hundreds beside the first steps.
        dataset = ray.data.from_items(range(windows), override_num_blocks=min(windows, _MOST_TASKS))
        dataset = dataset.map_batches(
            _mask_windows,
            fn_args=(plan, list(slots), steps),
            batch_size=1,
            batch_format="numpy",
            num_cpus=min(1.0, math.floor(cpus * 1e4) / 1e4),  # as fine as Ray counts
        )
        blocks = dataset.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow")
        yield from _by_step(blocks, plan.order, slots, steps)


def _count_windows(order: Order, steps: range) -> int:
    """How many windows a range of steps reads from."""
    return _number(order, steps.stop - 1) - _number(order, steps.start) + 1 if steps else 0


def _window_at(order: Order, steps: range, index: int) -> range:
    """The steps of a range that read from its window `index`."""
    number = _number(order, steps.start) + index
    window = order.steps_of(*divmod(number, _windows_per_epoch(order)))
    return range(max(window.start, steps.start), min(window.stop, steps.stop))


def _number(order: Order, step: int) -> int:
    """The number of a step's window, counted from the run's first."""
    epoch, window = order.window_of(step)
    return epoch * _windows_per_epoch(order) + window


def _windows_per_epoch(order: Order) -> int:
    return -(-order.steps_per_epoch // order.window_steps)


def _mask_windows(
    items: dict[str, npt.NDArray[np.int64]], plan: BatchPlan, slots: list[int], steps: range
) -> Iterator[pa.Table]:
    """The operator: window numbers in, tables of masked rows out, several whole steps a table."""
    for item in items["item"]:
        window = _window_at(plan.order, steps, int(item))
        pending: list[MicroBatch] = []
        size = 0
        for step in plan.micro_batches(slots, window):
            pending += step
            size += sum(batch.input_ids.nbytes + batch.labels.nbytes for batch in step)
            if size >= BLOCK_BYTES // 2:
                yield _to_table(pending)
                pending, size = [], 0
        if pending:
            yield _to_table(pending)


def _to_table(batches: list[MicroBatch]) -> pa.Table:
    counts = [len(batch.row_ids) for batch in batches]
    width = batches[0].input_ids.shape[1]

    def rows(arrays: list[npt.NDArray[np.int32]]) -> pa.Array:
        flat = pa.array(np.concatenate(arrays).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, width)

    return pa.table(
        {
            "step": np.repeat([batch.step for batch in batches], counts),
            "slot": np.repeat([batch.micro_batch_index for batch in batches], counts),
            "row_id": np.concatenate([batch.row_ids for batch in batches]),
            "input_ids": rows([batch.input_ids for batch in batches]),
            "labels": rows([batch.labels for batch in batches]),
        }
    )


def _by_step(
    tables: Iterable[pa.Table], order: Order, slots: Sequence[int], steps: range
) -> Iterator[list[MicroBatch]]:
    """Cut tables back into the steps' micro-batches; a step may straddle two tables.

    Raises:
        RaybertError: micro-batches are missing, come twice or out of order.
    """
    made = _cut_whole(tables)
    for step in steps:
        due = _slots_with_rows(order, slots, step)
        batches = next(made, []) if due else []  # an epoch's last step may have no row of this rank
        found = [(batch.step, batch.micro_batch_index) for batch in batches]
        if found != [(step, slot) for slot in due]:
            raise RaybertError(
                f"Ray Data gave the micro-batches (step, slot) {found} where those of step {step}, "
                f"slots {due}, were due; run it again to go on from the last checkpoint"
            )
        yield batches


def _slots_with_rows(order: Order, slots: Sequence[int], step: int) -> list[int]:
    """Those of the slots that have a row in a step: all of them, but in an epoch's last step."""
    used = step % order.steps_per_epoch * order.micro_batch_size
    ends = [order.rows * (slot + 1) // order.micro_batches_per_step for slot in slots]
    begins = [order.rows * slot // order.micro_batches_per_step for slot in slots]
    return [s for s, begin, end in zip(slots, begins, ends, strict=True) if end - begin > used]


def _cut_whole(tables: Iterable[pa.Table]) -> Iterator[list[MicroBatch]]:
    """Cut tables into steps, holding back each table's last step: the next may continue it."""
    held: pa.Table | None = None
    for table in tables:
        joined = table if held is None else pa.concat_tables([held, table])
        step = joined["step"].to_numpy()
        whole = int(np.searchsorted(step, step[-1]))
        yield from _cut(joined.slice(0, whole))
        held = joined.slice(whole)
    if held is not None:
        yield from _cut(held)


def _cut(table: pa.Table) -> Iterator[list[MicroBatch]]:
    """Cut a table of whole steps at every change of step, and each step at every change of slot."""
    if not len(table):
        return
    step, slot, row_id = (table[name].to_numpy() for name in ("step", "slot", "row_id"))
    inputs, labels = (
        column.combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        for column in (table["input_ids"], table["labels"])
    )
    ends = [*np.flatnonzero(np.diff(step) | np.diff(slot)) + 1, len(table)]
    batches: list[MicroBatch] = []
    begin = 0
    for end in ends:
        if batches and batches[0].step != step[begin]:
            yield batches
            batches = []
        at = slice(begin, end)
        batches.append(
            MicroBatch(int(step[begin]), int(slot[begin]), row_id[at], inputs[at], labels[at])
        )
        begin = end
    yield batches
