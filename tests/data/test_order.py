"""The laws of the data order: a step's rows depend on seed, corpus and step alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.data.keyed import Permutation, key_of, keyed_uniform
from raybert.data.order import Order, assign_to_ranks

sizes = st.integers(1, 3000)


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_reaches_every_number_once_and_inverts(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    values = permutation(np.arange(size))
    assert sorted(values) == list(range(size))
    where = size // 2
    assert permutation.inverse(int(values[where])) == where


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2**32, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_permutation_of_any_size_inverts(size: int, key: int, data: st.DataObject) -> None:
    permutation = Permutation(size, key)
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    values = permutation(np.array(positions))
    assert values.min() >= 0 and values.max() < size
    assert [permutation.inverse(int(value)) for value in values] == positions


def test_a_permutation_moves_things_as_a_random_one_would() -> None:
    values = Permutation(10_000, key_of("x"))(np.arange(10_000))
    # The mean distance of a random permutation is n / 3, its fixed points are 1 in expectation.
    assert abs(np.abs(values - np.arange(10_000)).mean() - 10_000 / 3) < 150
    assert (values == np.arange(10_000)).sum() < 8
    assert (values != Permutation(10_000, key_of("y"))(np.arange(10_000))).mean() > 0.99


def test_uniform_numbers_are_uniform_along_every_coordinate() -> None:
    draws = keyed_uniform(key_of("u"), np.arange(300)[:, None], np.arange(400))
    assert abs(draws.mean() - 0.5) < 0.005
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(np.corrcoef(draws[:20])[np.triu_indices(20, 1)]).max() < 0.2
    assert np.histogram(draws, 10, (0, 1))[0].std() < 200


@settings(max_examples=60, deadline=None)
@given(
    rows=sizes,
    rows_per_group=st.sampled_from([1, 4, 32]),
    slots=st.integers(1, 6),
    micro=st.integers(1, 8),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_exactly_once(
    rows: int, rows_per_group: int, slots: int, micro: int, seed: int, epoch: int
) -> None:
    order = Order(rows, rows_per_group, slots * micro, micro, seed)
    first = epoch * order.steps_per_epoch
    seen: list[int] = []
    for step in range(first, first + order.steps_per_epoch):
        batch = [order.micro_batch(step, slot) for slot in range(slots)]
        sizes = [len(ids) for ids in batch]
        assert max(sizes) - min(sizes) <= 1 or step == first + order.steps_per_epoch - 1
        if step < first + order.steps_per_epoch - 1:
            assert sum(sizes) == order.global_batch_size
        seen += [int(i) for ids in batch for i in ids]
    assert sorted(seen) == list(range(rows))


def test_epochs_differ_and_so_do_seeds() -> None:
    order = Order(2000, 32, 16, 8, seed=1)
    other = Order(2000, 32, 16, 8, seed=2)
    first = order.micro_batch(0, 0)
    assert set(first) != set(order.micro_batch(order.steps_per_epoch, 0))
    assert set(first) != set(other.micro_batch(0, 0))


def test_windows_tile_the_steps() -> None:
    order = Order(100_000, 32, 64, 32, seed=0)
    for step in (0, 1, 255, 256, order.steps_per_epoch - 1, order.steps_per_epoch + 3):
        assert step in order.steps_of(*order.window_of(step))


@pytest.mark.parametrize(("parts", "micro", "slots"), [(42, 32, 2), (1000, 32, 1), (300, 16, 16)])
def test_a_batch_mixes_parts_as_a_random_draw_would(parts: int, micro: int, slots: int) -> None:
    rows_per_part = 4096
    order = Order(parts * rows_per_part, 32, micro * slots, micro, seed=3)
    rng = np.random.default_rng(0)
    ours, drawn = [], []
    for step in rng.integers(0, order.steps_per_epoch, 40):
        ids = np.concatenate([order.micro_batch(int(step), s) for s in range(slots)])
        ours.append(len(np.unique(ids // rows_per_part)))
        drawn.append(len(np.unique(rng.integers(0, parts, micro * slots))))
    assert np.mean(ours) == pytest.approx(np.mean(drawn), rel=0.1)


@given(slots=st.integers(1, 64), world=st.integers(1, 16))
def test_slots_are_dealt_whole_and_evenly(slots: int, world: int) -> None:
    shares = assign_to_ranks(slots, world)
    assert sorted(s for share in shares for s in share) == list(range(slots))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(2**33, 2**60),
    rows_per_group=st.sampled_from([1, 4, 32]),
    slots=st.integers(1, 5000),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_windows_of_huge_corpora_share_no_row(
    rows: int, rows_per_group: int, slots: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    order = Order(rows, rows_per_group, slots * 4, 4, seed)
    last = order.steps_of(*order.window_of((epoch + 1) * order.steps_per_epoch - 1))
    windows = {order.window_of(step)[1] for step in (last.start - 1, last.start)}
    windows.add(data.draw(st.integers(0, max(windows))))
    chosen = {0, slots - 1, data.draw(st.integers(0, slots - 1))}
    drawn = [order.window(epoch, window, slot) for window in windows for slot in chosen]
    seen = np.concatenate(drawn)
    assert seen.min() >= 0 and seen.max() < rows
    assert len(np.unique(seen)) == len(seen)
    assert max(len(ids) for ids in drawn) == order.window_rows
    for ids in drawn:  # whole groups, but for both ends and the short one: little is read twice
        groups = np.unique(ids // rows_per_group)
        assert len(groups) <= -(-len(ids) // rows_per_group) + 2


def test_a_step_far_into_ten_billion_rows_is_made_of_as_many_as_the_first() -> None:
    order = Order(10_000_000_000, 32, 2048, 32, seed=0)
    for step in (0, order.steps_per_epoch * 3 - 7):
        ids = order.micro_batch(step, 63)
        assert len(np.unique(ids)) == 32 and ids.max() < 10_000_000_000
