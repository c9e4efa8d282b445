"""Batches from Ray Data's tables: what is missing, twice or out of order is noticed."""

import numpy as np
import pytest

from raybert.data.loader import MicroBatch, _by_step, _to_table
from raybert.data.order import Order
from raybert.errors import RaybertError

# 13 rows in slots of 3, 3, 3 and 4, by 3 a step: an epoch's second step is slot 3's alone.
ORDER = Order(rows=13, rows_per_group=2, global_batch_size=12, micro_batch_size=3, seed=0)


def micro_batch(step, slot):
    ids = ORDER.micro_batch(step, slot)
    rows = np.tile(ids[:, None], (1, 4)).astype(np.int32)
    return MicroBatch(step, slot, ids, rows, rows)


def tables(slots, steps):
    batches = [[micro_batch(step, slot) for slot in slots] for step in steps]
    return [_to_table(whole) for step in batches if (whole := [b for b in step if len(b.row_ids)])]


@pytest.mark.parametrize("slots", [[0], [3], [0, 1], [2, 3], [0, 1, 2, 3]])
def test_tables_come_back_as_steps_those_without_a_row_empty(slots):
    steps = range(1, 7)
    found = list(_by_step(tables(slots, steps), ORDER, slots, steps))
    assert [[(b.step, b.micro_batch_index) for b in batches] for batches in found] == [
        [(step, slot) for slot in slots if len(ORDER.micro_batch(step, slot))] for step in steps
    ]
    assert ([] in found) == (3 not in slots)
    for batches in found:
        for batch in batches:
            assert (
                batch.row_ids.tolist()
                == ORDER.micro_batch(batch.step, batch.micro_batch_index).tolist()
            )
            assert (batch.input_ids == batch.row_ids[:, None]).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made[:2] + made[3:],  # one is missing
        lambda made: made[:-1],  # the last one is
        lambda made: [],
        lambda made: [made[1], made[0], *made[2:]],
        lambda made: [made[0], made[0], *made[1:]],
        lambda made: [made[0].slice(0, 3), *made[1:]],  # a slot of a step is
    ],
)
def test_what_is_missing_or_out_of_place_is_an_error(spoil):
    slots, steps = [2, 3], range(6)
    with pytest.raises(RaybertError, match="were due"):
        list(_by_step(spoil(tables(slots, steps)), ORDER, slots, steps))
