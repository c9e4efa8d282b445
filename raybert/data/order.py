"""Which rows make up the global batch of a step: a pure function of (seed, corpus size, step).

A global batch is a fixed list of micro-batches, one for each *slot*. Slots are what is dealt to
workers, so any number of workers computes the same steps. Every slot walks its own share of an
epoch: the split's row groups in a keyed permutation, cut into slots of equal length, each cut into
*windows* whose rows are shuffled. So a slot reads nothing that belongs to another one, holds one
window in memory however large the corpus is, and starts at any step by reading the one window that
the step lies in. (MosaicML Streaming's canonical nodes and py1s shuffle are kin of this.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raybert.data.keyed import I64, Permutation, key_of

# A window spans eight row groups for each row of a micro-batch. Drawing b rows from 8 b groups, one
# in sixteen meets a group that was drawn before: a batch mixes nearly as many parts as a free draw.
WINDOW_GROUPS_PER_ROW = 8


@dataclass(frozen=True)
class Order:
    """The order of a training run over a split of a corpus."""

    rows: int
    rows_per_group: int
    global_batch_size: int
    micro_batch_size: int
    seed: int

    @property
    def micro_batches_per_step(self) -> int:
        """How many micro-batches make up a global batch."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every row once; the last one may be smaller."""
        longest = -(-self.rows // self.micro_batches_per_step)
        return max(1, -(-longest // self.micro_batch_size))

    @property
    def window_rows(self) -> int:
        """Rows that a slot shuffles among each other: a whole number of micro-batches."""
        return WINDOW_GROUPS_PER_ROW * self.micro_batch_size * self.rows_per_group

    @property
    def window_steps(self) -> int:
        """Steps that a window lasts."""
        return self.window_rows // self.micro_batch_size

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def window_of(self, step: int) -> tuple[int, int]:
        """The (epoch, window) that a step reads from; the same for every slot."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within // self.window_steps

    def steps_of(self, epoch: int, window: int) -> range:
        """The steps that read from a window."""
        begin = epoch * self.steps_per_epoch
        first = begin + window * self.window_steps
        return range(first, min(first + self.window_steps, begin + self.steps_per_epoch))

    def window(self, epoch: int, window: int, slot: int) -> I64:
        """The row ids of a slot's window, int64 [up to window_rows], in the order of their use."""
        begin, end = (self.rows * s // self.micro_batches_per_step for s in (slot, slot + 1))
        first = begin + window * self.window_rows
        count = max(0, min(self.window_rows, end - first))
        shuffled = Permutation(count, key_of("window", self.seed, epoch, slot, window))
        return self._row_ids(epoch, first + shuffled(np.arange(count)))

    def micro_batch(self, step: int, slot: int) -> I64:
        """The row ids of a slot's micro-batch in a step, int64 [up to micro_batch_size]."""
        epoch, window = self.window_of(step)
        at = (step - self.steps_of(epoch, window).start) * self.micro_batch_size
        return self.window(epoch, window, slot)[at : at + self.micro_batch_size]

    def _row_ids(self, epoch: int, positions: I64) -> I64:
        """Rows at positions of the epoch: groups are permuted, rows inside a group keep in line."""
        per_group = self.rows_per_group
        groups, short = -(-self.rows // per_group), self.rows % per_group
        permuted = _groups(groups, key_of("groups", self.seed, epoch))
        if short:
            # The split's last group is short: positions behind it are shifted by what it lacks.
            short_at = _where(groups, key_of("groups", self.seed, epoch), groups - 1)
            end = short_at * per_group + short
            positions = np.where(positions < end, positions, positions + per_group - short)
        rows: I64 = permuted(positions // per_group) * per_group + positions % per_group
        return rows


@lru_cache(maxsize=8)
def _groups(count: int, key: int) -> Permutation:
    return Permutation(count, key)


@lru_cache(maxsize=8)
def _where(count: int, key: int, value: int) -> int:
    """The position at which a permutation has a value."""
    return _groups(count, key).inverse(value)


def assign_to_ranks(slots: int, world_size: int) -> list[list[int]]:
    """Deal slots to ranks: contiguous, whole, as even as can be."""
    return [
        list(range(slots * rank // world_size, slots * (rank + 1) // world_size))
        for rank in range(world_size)
    ]
