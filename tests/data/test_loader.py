"""Micro-batches from Ray Data's tables: missing, repeated or reordered ones are an error."""

import numpy as np
import pytest

from raybert.data.loader import MicroBatch, _by_step, _from_tables, _to_table
from raybert.data.order import CorpusOrder
from raybert.errors import RaybertError

# 13 rows in shares of 3, 3, 3 and 4, by 3 a step: only index 3 has a row in an epoch's second step.
ORDER = CorpusOrder(rows=13, rows_per_group=2, global_batch_size=12, micro_batch_size=3, seed=0)


def micro_batch(step, index):
    ids = ORDER.micro_batch(step, index)
    rows = np.tile(ids[:, None], (1, 4)).astype(np.int32)
    return MicroBatch(step, index, ids, rows, rows)


def tables(indices, steps):
    batches = [[micro_batch(step, index) for index in indices] for step in steps]
    return [_to_table(whole) for step in batches if (whole := [b for b in step if len(b.row_ids)])]


def batches_of(tables, indices, steps):
    return list(_by_step(_from_tables(tables), ORDER, indices, steps))


@pytest.mark.parametrize("indices", [[0], [3], [0, 1], [2, 3], [0, 1, 2, 3]])
def test_every_step_has_its_micro_batches_or_an_empty_list(indices):
    steps = range(1, 7)
    found = batches_of(tables(indices, steps), indices, steps)
    assert [[(b.step, b.micro_batch_index) for b in batches] for batches in found] == [
        [(step, index) for index in indices if len(ORDER.micro_batch(step, index))]
        for step in steps
    ]
    assert ([] in found) == (3 not in indices)
    for batches in found:
        for batch in batches:
            assert (
                batch.row_ids.tolist()
                == ORDER.micro_batch(batch.step, batch.micro_batch_index).tolist()
            )
            assert (batch.input_ids == batch.row_ids[:, None]).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made[:2] + made[3:],  # a table is missing
        lambda made: made[:-1],  # the last one is missing
        lambda made: [],
        lambda made: [made[1], made[0], *made[2:]],
        lambda made: [made[0], made[0], *made[1:]],
        lambda made: [made[0].slice(0, 1), *made[1:]],  # a micro-batch of a step is missing
    ],
)
def test_missing_repeated_or_reordered_micro_batches_are_an_error(change):
    indices, steps = [2, 3], range(6)
    with pytest.raises(
        RaybertError, match=r"returned the micro-batches \(step, index\) .*, expected \[\("
    ):
        batches_of(change(tables(indices, steps)), indices, steps)
