"""The data order: the rows of a step depend on seed, data and step alone."""

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.data.keyed import Permutation, key_of, keyed_uniform
from raybert.data.order import CorpusOrder, LengthGroupedOrder, assign_to_ranks

sizes = st.integers(1, 3000)


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection_with_an_inverse(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    values = permutation(np.arange(size))
    assert sorted(values) == list(range(size))
    where = size // 2
    assert permutation.inverse(int(values[where])) == where


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2**32, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_permutation_of_any_size_has_an_inverse(size: int, key: int, data: st.DataObject) -> None:
    permutation = Permutation(size, key)
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    values = permutation(np.array(positions))
    assert values.min() >= 0 and values.max() < size
    assert [permutation.inverse(int(value)) for value in values] == positions


def test_a_permutation_displaces_values_like_a_random_one() -> None:
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


@settings(max_examples=examples(20), deadline=None)
@given(
    rows=sizes,
    rows_per_group=st.sampled_from([1, 4, 32]),
    count=st.integers(1, 6),
    micro=st.integers(1, 8),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_exactly_once(
    rows: int, rows_per_group: int, count: int, micro: int, seed: int, epoch: int
) -> None:
    order = CorpusOrder(rows, rows_per_group, count * micro, micro, seed)
    first = epoch * order.steps_per_epoch
    seen: list[int] = []
    for step in range(first, first + order.steps_per_epoch):
        batch = [order.micro_batch(step, index) for index in range(count)]
        assert order.indices_with_rows(step, range(count)) == [
            index for index in range(count) if len(batch[index])
        ]
        sizes = [len(ids) for ids in batch]
        assert max(sizes) - min(sizes) <= 1 or step == first + order.steps_per_epoch - 1
        if step < first + order.steps_per_epoch - 1:
            assert sum(sizes) == order.global_batch_size
        seen += [int(i) for ids in batch for i in ids]
    assert sorted(seen) == list(range(rows))


def test_epochs_differ_and_so_do_seeds() -> None:
    order = CorpusOrder(2000, 32, 16, 8, seed=1)
    other = CorpusOrder(2000, 32, 16, 8, seed=2)
    first = order.micro_batch(0, 0)
    assert set(first) != set(order.micro_batch(order.steps_per_epoch, 0))
    assert set(first) != set(other.micro_batch(0, 0))


def test_windows_tile_the_steps() -> None:
    order = CorpusOrder(100_000, 32, 64, 32, seed=0)
    for step in (0, 1, 255, 256, order.steps_per_epoch - 1, order.steps_per_epoch + 3):
        assert step in order.steps_of(*order.window_of(step))


@settings(max_examples=40, deadline=None)
@given(rows=sizes, first=st.integers(0, 400), count=st.integers(0, 90), index=st.integers(0, 2))
def test_consecutive_steps_have_the_micro_batches_of_each_step(
    rows: int, first: int, count: int, index: int
) -> None:
    order = CorpusOrder(rows, rows_per_group=2, global_batch_size=6, micro_batch_size=2, seed=4)
    steps = range(first, first + count)
    parts = list(order.split_at_windows(steps))
    assert [step for part in parts for step in part] == list(steps)
    assert all(order.window_of(part[0]) == order.window_of(part[-1]) for part in parts)
    batches = order.micro_batches(steps, index)
    assert [ids.tolist() for ids in batches] == [
        order.micro_batch(step, index).tolist() for step in steps
    ]


@pytest.mark.parametrize(("parts", "micro", "count"), [(42, 32, 2), (1000, 32, 1), (300, 16, 16)])
def test_a_batch_mixes_parts_as_a_random_draw_would(parts: int, micro: int, count: int) -> None:
    rows_per_part = 4096
    order = CorpusOrder(parts * rows_per_part, 32, micro * count, micro, seed=3)
    rng = np.random.default_rng(0)
    ours, drawn = [], []
    for step in rng.integers(0, order.steps_per_epoch, 40):
        ids = np.concatenate([order.micro_batch(int(step), i) for i in range(count)])
        ours.append(len(np.unique(ids // rows_per_part)))
        drawn.append(len(np.unique(rng.integers(0, parts, micro * count))))
    assert np.mean(ours) == pytest.approx(np.mean(drawn), rel=0.1)


@given(count=st.integers(1, 64), world_size=st.integers(1, 16))
def test_micro_batches_are_assigned_to_ranks_whole_and_evenly(count: int, world_size: int) -> None:
    shares = assign_to_ranks(count, world_size)
    assert [index for share in shares for index in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(2**33, 2**60),
    rows_per_group=st.sampled_from([1, 4, 32]),
    count=st.integers(1, 5000),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_windows_of_huge_corpora_share_no_row(
    rows: int, rows_per_group: int, count: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    order = CorpusOrder(rows, rows_per_group, count * 4, 4, seed)
    last = order.steps_of(*order.window_of((epoch + 1) * order.steps_per_epoch - 1))
    windows = {order.window_of(step)[1] for step in (last.start - 1, last.start)}
    windows.add(data.draw(st.integers(0, max(windows))))
    chosen = {0, count - 1, data.draw(st.integers(0, count - 1))}
    drawn = [order.rows_of_window(epoch, window, index) for window in windows for index in chosen]
    seen = np.concatenate(drawn)
    assert seen.min() >= 0 and seen.max() < rows
    assert len(np.unique(seen)) == len(seen)
    assert max(len(ids) for ids in drawn) == order.window_rows
    for ids in drawn:  # whole groups except at both ends and the short one: little is read twice
        groups = np.unique(ids // rows_per_group)
        assert len(groups) <= -(-len(ids) // rows_per_group) + 2


def test_a_late_step_of_ten_billion_rows_has_a_full_micro_batch() -> None:
    order = CorpusOrder(10_000_000_000, 32, 2048, 32, seed=0)
    for step in (0, order.steps_per_epoch * 3 - 7):
        ids = order.micro_batch(step, 63)
        assert len(np.unique(ids)) == 32 and ids.max() < 10_000_000_000


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=300),
    count=st.integers(1, 5),
    micro=st.integers(1, 5),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 3),
)
def test_an_epoch_of_texts_holds_every_text_exactly_once(
    lengths: list[int], count: int, micro: int, seed: int, epoch: int
) -> None:
    order = LengthGroupedOrder(np.array(lengths), count * micro, micro, seed)
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    batches = {(s, i): order.micro_batch(s, i).tolist() for s in steps for i in range(count)}
    assert sorted(sum(batches.values(), [])) == list(range(len(lengths)))
    assert all(len(batches[s, i]) == micro for s in steps[:-1] for i in range(count))
    # A fresh order, as after a restart, gives the same batch.
    again = LengthGroupedOrder(np.array(lengths), count * micro, micro, seed)
    assert again.micro_batch(steps[-1], count - 1).tolist() == batches[steps[-1], count - 1]


def test_texts_of_similar_length_share_a_batch_and_batches_are_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 5000)
    order = LengthGroupedOrder(lengths, global_batch_size=16, micro_batch_size=16, seed=1)
    batches = [lengths[order.micro_batch(step, 0)] for step in range(order.steps_per_epoch - 1)]
    assert np.mean([np.ptp(batch) for batch in batches]) < 20
    means = np.array([batch.mean() for batch in batches])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2
    assert set(order.micro_batch(0, 0)) != set(order.micro_batch(order.steps_per_epoch, 0))
