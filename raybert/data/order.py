"""Which rows make up the global batch of a step, in pretraining and in fine-tuning.

Both orders are pure functions of (seed, data, step), so a run resumes at any step. A global batch
is a fixed list of micro-batches, numbered by the micro-batch index. Complete micro-batches are
assigned to ranks, so any number of workers computes the same steps.

`CorpusOrder` (pretraining) scales to any corpus:

1. An epoch is the split's row groups in a keyed permutation.
2. It is divided into equal shares, one per micro-batch index, each share into *windows*.
3. The rows of a window are shuffled, and each step takes the next `micro_batch_size` of them.

1,000 rows in groups of 10, 2 micro-batches of 4 rows: index 0 has the first 500 rows of the
permuted groups, in windows of 320 and 180 rows; step 0 takes the first 4 of the shuffled 320.

So a reader of one index shares at most the groups at the ends of its share with others, holds one
window in memory however large the corpus is, and starts at any step by reading that step's window.
MosaicML Streaming's canonical nodes with py1s shuffling are a related design.

`LengthGroupedOrder` (fine-tuning) permutes all texts and puts texts of similar length in one batch,
so that little padding is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from raybert.data.keyed import I64, Permutation, key_of

# A window spans eight row groups for each row of a micro-batch. Of b rows drawn from 8 b groups,
# about 1/16 repeat a group, so that the shuffle is close to uniform.
WINDOW_GROUPS_PER_ROW = 8

# Long enough that the texts of a batch have equal lengths, short enough that an epoch is shuffled.
_BATCHES_SORTED_TOGETHER = 50


class _MicroBatches:
    """The division of a global batch, common to both orders."""

    global_batch_size: int  # rows in an optimizer step
    micro_batch_size: int  # rows in a micro-batch

    @property
    def micro_batches_per_step(self) -> int:
        """How many micro-batches make up a global batch."""
        return self.global_batch_size // self.micro_batch_size


@dataclass(frozen=True)
class CorpusOrder(_MicroBatches):
    """The order of pretraining over a split of a corpus."""

    rows: int
    rows_per_group: int
    global_batch_size: int
    micro_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every row once; the last one may be smaller."""
        longest = -(-self.rows // self.micro_batches_per_step)
        return max(1, -(-longest // self.micro_batch_size))

    @property
    def window_rows(self) -> int:
        """Rows that are shuffled together: a whole number of micro-batches."""
        return WINDOW_GROUPS_PER_ROW * self.micro_batch_size * self.rows_per_group

    @property
    def window_steps(self) -> int:
        """Steps that read from one window."""
        return self.window_rows // self.micro_batch_size

    def window_of(self, step: int) -> tuple[int, int]:
        """The (epoch, window) that a step reads from; the same for every micro-batch index."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within // self.window_steps

    def steps_of(self, epoch: int, window: int) -> range:
        """The steps that read from a window."""
        begin = epoch * self.steps_per_epoch
        first = begin + window * self.window_steps
        return range(first, min(first + self.window_steps, begin + self.steps_per_epoch))

    def split_at_windows(self, steps: range) -> Iterator[range]:
        """Split consecutive steps into ranges that each read from one window."""
        step = steps.start
        while step < steps.stop:
            stop = min(self.steps_of(*self.window_of(step)).stop, steps.stop)
            yield range(step, stop)
            step = stop

    def micro_batch(self, step: int, index: int) -> I64:
        """The row ids of a step's micro-batch `index`, int64 [up to micro_batch_size]."""
        [row_ids] = self.micro_batches(range(step, step + 1), index)
        return row_ids

    def micro_batches(self, steps: range, index: int) -> list[I64]:
        """The row ids of micro-batch `index` in each of consecutive steps; see `micro_batch`."""
        size = self.micro_batch_size
        batches = []
        for part in self.split_at_windows(steps):
            epoch, window = self.window_of(part.start)
            first = self.steps_of(epoch, window).start
            row_ids = self.rows_of_window(epoch, window, index)
            batches += [row_ids[(s - first) * size : (s - first + 1) * size] for s in part]
        return batches

    def indices_with_rows(self, step: int, indices: Sequence[int]) -> list[int]:
        """The micro-batch indices that have a row in a step; fewer in the last step of an epoch."""
        used = step % self.steps_per_epoch * self.micro_batch_size
        return [i for i in indices if used < self._share_begin(i + 1) - self._share_begin(i)]

    def rows_of_window(self, epoch: int, window: int, index: int) -> I64:
        """The row ids of one micro-batch index in a window, int64 [up to window_rows], in order."""
        first = self._share_begin(index) + window * self.window_rows
        count = max(0, min(self.window_rows, self._share_begin(index + 1) - first))
        shuffled = Permutation(count, key_of("window", self.seed, epoch, index, window))
        return self._row_ids(epoch, first + shuffled(np.arange(count)))

    def _share_begin(self, index: int) -> int:
        """The position in an epoch at which the share of a micro-batch index begins."""
        return self.rows * index // self.micro_batches_per_step

    def _row_ids(self, epoch: int, positions: I64) -> I64:
        """The rows at positions of an epoch: groups are permuted, rows of a group stay in order."""
        per_group = self.rows_per_group
        groups, short = -(-self.rows // per_group), self.rows % per_group
        key = key_of("groups", self.seed, epoch)
        if short:
            # The split's last group is short: later positions are shifted by the rows it lacks.
            end = _position_of(groups, key, groups - 1) * per_group + short
            positions = np.where(positions < end, positions, positions + per_group - short)
        permuted = _group_permutation(groups, key)
        rows: I64 = permuted(positions // per_group) * per_group + positions % per_group
        return rows


@lru_cache(maxsize=8)
def _group_permutation(count: int, key: int) -> Permutation:
    return Permutation(count, key)


@lru_cache(maxsize=8)
def _position_of(count: int, key: int, value: int) -> int:
    """The position at which a permutation has a value."""
    return _group_permutation(count, key).inverse(value)


@dataclass
class LengthGroupedOrder(_MicroBatches):
    """The order of fine-tuning: shuffled by a key, texts of similar length in one batch."""

    lengths: I64  # [rows], tokens of each text
    global_batch_size: int
    micro_batch_size: int
    seed: int
    _epoch: tuple[int, I64] = field(default=(-1, np.empty(0, np.int64)), init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every text once; the last one may be smaller."""
        return max(1, -(-len(self.lengths) // self.global_batch_size))

    def micro_batch(self, step: int, index: int) -> I64:
        """The row ids of a step's micro-batch `index`, int64 [up to micro_batch_size]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:  # the rows of one epoch stay in memory
            self._epoch = epoch, self._rows_of_epoch(epoch)
        begin = within * self.global_batch_size
        batch = self._epoch[1][begin : begin + self.global_batch_size]
        # The last batch of an epoch may be short; its rows are spread over all micro-batches.
        count = self.micro_batches_per_step
        return batch[len(batch) * index // count : len(batch) * (index + 1) // count]

    def _rows_of_epoch(self, epoch: int) -> I64:
        """The rows of an epoch in the order of their use, int64 [rows]."""
        count, size = len(self.lengths), self.global_batch_size
        rows = Permutation(count, key_of("texts", self.seed, epoch))(np.arange(count))
        together = size * _BATCHES_SORTED_TOGETHER
        for begin in range(0, count, together):
            part = rows[begin : begin + together]
            rows[begin : begin + together] = part[np.argsort(self.lengths[part], kind="stable")]
        whole = count // size
        order = Permutation(max(1, whole), key_of("batches", self.seed, epoch))(np.arange(whole))
        batches = rows[: whole * size].reshape(whole, size)[order].ravel()
        return np.concatenate([batches, rows[whole * size :]])


def assign_to_ranks(micro_batches: int, world_size: int) -> list[list[int]]:
    """Assign the micro-batch indices of a step to ranks: contiguous and as evenly as possible."""
    return [
        list(range(micro_batches * rank // world_size, micro_batches * (rank + 1) // world_size))
        for rank in range(world_size)
    ]
