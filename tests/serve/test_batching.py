"""The batcher: every row once, within the token budget, in order, with a bounded queue."""

import asyncio
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.serve.runtime.batching import Batcher, ModelFailed, Overloaded

SHARES = ThreadPoolExecutor(4)
LENGTHS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=12)


def scores_of(rows):
    """Scores that identify a row: its sum and its length."""
    return np.array([[row.sum(), len(row)] for row in rows], np.float32)


def requests_of(lengths):
    """Rows of these lengths, each filled with its number."""
    number, requests = 0, []
    for request in lengths:
        rows = []
        for length in request:
            number += 1
            rows.append(np.full(length, number))
        requests.append(rows)
    return requests


class Recorder:
    """Computes and records every batch; waits for the event `release` if it is given."""

    def __init__(self, release=None):
        self.batches, self.release, self.running, self.max_running = [], release, 0, 0

    def __call__(self, rows):
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        if self.release is not None:
            assert self.release.wait(30)
        self.batches.append([(int(row[0]) if len(row) else 0, len(row)) for row in rows])
        self.running -= 1
        return scores_of(rows)


class Threads(NamedTuple):
    all_cores: Executor
    shares: Executor
    count: int


async def until(condition):
    """Wait until a condition holds, however busy the machine is."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def batcher(compute, executor, count=1, **changes):
    values = {"tokens_per_batch": 16, "queue_s": 1e9, **changes}
    return Batcher(compute, Threads(executor, SHARES, count), **values)


def run(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 30)

    return asyncio.run(bounded())


@pytest.fixture(scope="module")
def executor():
    with ThreadPoolExecutor(1, "whole") as made:
        yield made


@given(LENGTHS, st.integers(1, 40), st.sampled_from([0.0, 0.001]), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_every_row_is_answered_once_and_with_its_own_score(
    executor, lengths, budget, wait_s, count
):
    requests, recorder = requests_of(lengths), Recorder()

    async def score_all():
        made = batcher(recorder, executor, count, tokens_per_batch=budget, wait_s=wait_s)
        made._speed = 1e9  # everything may wait
        return await asyncio.gather(*(made.score(rows) for rows in requests)), made

    answers, made = run(score_all())
    for rows, scores in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(scores, scores_of(rows))
    computed = sorted(row for batch in recorder.batches for row in batch if row[1])
    assert computed == sorted(
        (int(row[0]), len(row)) for rows in requests for row in rows if len(row)
    )
    assert sum(map(len, recorder.batches)) == sum(map(len, requests))
    assert made.queued_tokens == 0


@given(LENGTHS, st.integers(1, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_batches_keep_to_the_budget_and_are_sorted_by_length(executor, lengths, budget, count):
    recorder = Recorder()

    async def score_all():
        made = batcher(recorder, executor, count, tokens_per_batch=budget)
        made._speed = 1e9
        await asyncio.gather(*(made.score(rows) for rows in requests_of(lengths)))

    run(score_all())
    for batch in recorder.batches:
        cost = sum(max(1, length) for _, length in batch)
        assert cost <= budget or len(batch) == 1
        assert [length for _, length in batch] == sorted(length for _, length in batch)
    assert recorder.max_running <= count


def test_rows_of_more_than_a_batch_are_split_evenly_and_computed_at_once(executor):
    """A single batch has all cores, and no other batch runs at the same time."""
    release, whole, shares = threading.Event(), [], []

    def compute(rows):
        is_whole = threading.current_thread().name.startswith("whole")
        batches = whole if is_whole else shares
        batches.append(sum(map(len, rows)))
        assert release.wait(30)
        return scores_of(rows)

    async def score_all():
        made = batcher(compute, executor, 2, tokens_per_batch=8)
        tasks = [asyncio.create_task(made.score(rows)) for rows in requests_of([[3]] + [[2]] * 6)]
        await until(lambda: whole or shares)
        assert (whole, shares) == ([3], []) and made.queued_tokens == 12  # the first one was alone
        release.set()
        await asyncio.gather(*tasks)
        release.clear()
        lone = asyncio.create_task(made.score([np.ones(8)]))
        await until(lambda: made.running_s > 0)
        release.set()
        await lone
        assert made.running_s == 0

    run(score_all())
    assert whole == [3, 8] and shares == [6, 6]


def test_rows_are_computed_in_the_order_of_their_arrival(executor):
    release = threading.Event()
    recorder = Recorder(release)

    async def score_all():
        made = batcher(recorder, executor, tokens_per_batch=6)
        made._speed = 1e9
        tasks = [asyncio.create_task(made.score(rows)) for rows in requests_of([[3]] * 9)]
        await asyncio.sleep(0.01)
        release.set()
        await asyncio.gather(*tasks)

    run(score_all())
    firsts = [min(number for number, _ in batch) for batch in recorder.batches]
    assert firsts == sorted(firsts)
    assert recorder.batches[0] == [(1, 3)]  # on an idle server a request does not wait
    assert [len(batch) for batch in recorder.batches[1:]] == [2] * 4  # the others share batches


def test_with_wait_s_two_requests_share_a_batch(executor):
    recorder = Recorder()

    async def score_all():
        made = batcher(recorder, executor, tokens_per_batch=100, wait_s=0.2)
        one, two = requests_of([[3], [4]])
        first = asyncio.create_task(made.score(one))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, made.score(two))

    run(score_all())
    assert recorder.batches == [[(1, 3), (2, 4)]]


def test_a_request_that_would_wait_too_long_is_rejected_and_queued_ones_are_answered(executor):
    release = threading.Event()

    async def score_all():
        made = batcher(Recorder(release), executor, tokens_per_batch=10, queue_s=2.0)
        made._speed = 15.0  # tokens per second: 30 may wait
        assert made.capacity == 30
        tasks = [asyncio.create_task(made.score(rows)) for rows in requests_of([[10]] * 4)]
        await asyncio.sleep(0.01)  # one runs, three wait
        assert made.queued_tokens == 30
        assert made.full_for_s() == pytest.approx(2.0)
        with pytest.raises(Overloaded) as rejected:
            with made.reserve(1):
                pass
        assert rejected.value.wait_s == pytest.approx(2.0)
        with pytest.raises(Overloaded):
            await made.score([np.ones(1)])
        release.set()
        answers = await asyncio.gather(*tasks)
        assert [scores[0][1] for scores in answers] == [10] * 4
        assert made.full_for_s() is None
        with made.reserve(1):
            pass

    run(score_all())


def test_requests_reserve_room_while_they_are_tokenized(executor):
    made = batcher(Recorder(), executor, tokens_per_batch=10, queue_s=2.0)
    made._speed = 15.0  # 30 tokens may wait
    with made.reserve(1000):  # nothing waits
        pass
    with made.reserve(25):
        with made.reserve(5):
            pass
        with pytest.raises(Overloaded) as rejected:
            with made.reserve(6):
                pass
        assert rejected.value.wait_s == pytest.approx(25 / 15)
    with made.reserve(1000):
        pass


def test_a_request_of_unknown_size_counts_like_the_others(executor):
    async def score_all():
        made = batcher(Recorder(), executor, tokens_per_batch=10, queue_s=2.0)
        for _ in range(30):
            await made.score([np.ones(10)])
        made._speed = 15.0
        with made.reserve(19):
            assert made.full_for_s() is None
        with made.reserve(21):
            assert made.full_for_s() == pytest.approx(21 / 15)
            with made.reserve(9):
                pass

    run(score_all())


def test_a_request_larger_than_the_queue_is_accepted_when_nothing_waits(executor):
    async def score_all():
        made = batcher(Recorder(), executor, tokens_per_batch=2, queue_s=0.001)
        made._speed = 1.0
        rows = [np.ones(5)] * 20
        assert np.shape(await made.score(rows)) == (20, 2)

    run(score_all())


def test_a_cancelled_request_leaves_nothing_in_the_queue(executor):
    release = threading.Event()
    recorder = Recorder(release)

    async def score_all():
        made = batcher(recorder, executor, tokens_per_batch=4)
        tasks = [asyncio.create_task(made.score(rows)) for rows in requests_of([[4], [4], [4]])]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        await asyncio.sleep(0)
        await asyncio.gather(tasks[1], return_exceptions=True)
        assert made.queued_tokens == 4
        release.set()
        await asyncio.gather(tasks[0], tasks[2])
        assert made.queued_tokens == 0

    run(score_all())
    assert recorder.batches == [[(1, 4)], [(3, 4)]]


def test_a_time_out_in_the_middle_of_a_batch_affects_no_other_request(executor):
    release = threading.Event()

    async def score_all():
        made = batcher(Recorder(release), executor, tokens_per_batch=8)
        first = asyncio.create_task(made.score([np.ones(8)]))
        await asyncio.sleep(0.01)
        gone, kept = (asyncio.create_task(made.score([np.ones(4)])) for _ in range(2))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gone, 0.01)
        release.set()
        await asyncio.gather(first, kept)
        assert made.queued_tokens == 0 and made.running_s == 0

    run(score_all())


def test_a_failure_is_raised_for_each_request_of_its_batch_and_no_other(executor):
    def compute(rows):
        if any(row[0] == 2 for row in rows):
            raise ValueError("no")
        return scores_of(rows)

    async def score_all():
        made = batcher(compute, executor, tokens_per_batch=4)
        found = await asyncio.gather(
            *(made.score(rows) for rows in requests_of([[4], [4, 4], [4]])), return_exceptions=True
        )
        assert isinstance(found[1], ModelFailed) and isinstance(found[1].__cause__, ValueError)
        assert not isinstance(found[0], Exception) and not isinstance(found[2], Exception)
        assert made.queued_tokens == 0

    run(score_all())


class SlowToStart:
    """A clock, and a model whose batches take 0.1 s and 1 ms a token by it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def __call__(self, rows):
        self.now += 0.1 + sum(map(len, rows)) / 1000
        return scores_of(rows)


@pytest.mark.parametrize("speed", [None, 200 / 0.3])
def test_after_a_short_text_what_the_queue_can_compute_in_time_is_accepted(
    executor, monkeypatch, speed
):
    """Full batches of 200 tokens take 0.3 s: in 3 s they compute 2,000 tokens."""
    model = SlowToStart()
    monkeypatch.setattr("raybert.serve.runtime.batching.time", model)

    async def score_all():
        made = batcher(model, executor, tokens_per_batch=200, queue_s=3.0, speed=speed)
        await made.score([np.ones(5)])  # 48 tokens per second
        lists = [made.score([np.ones(1)] * 100) for _ in range(12)]
        answers = await asyncio.gather(*lists)
        assert [len(scores) for scores in answers] == [100] * 12
        assert made._speed == pytest.approx(200 / 0.3, rel=0.1)
        assert made.capacity == pytest.approx(2000, rel=0.1)

    run(score_all())


@given(st.lists(st.tuples(st.integers(1, 49), st.floats(1e-6, 1e3)), max_size=20))
def test_small_batches_do_not_change_the_speed(batches):
    made = batcher(scores_of, None, tokens_per_batch=100, speed=1000.0)
    for tokens, seconds in batches:
        made._update_speed(tokens, seconds)
    assert made._speed == 1000.0
    for _ in range(30):
        made._update_speed(100, 1.0)
    assert made._speed == pytest.approx(100, rel=0.05)


def test_the_share_of_busy_time_and_of_the_queue_are_measured(executor, monkeypatch):
    release, model = threading.Event(), SlowToStart()
    monkeypatch.setattr("raybert.serve.runtime.batching.time", model)

    def compute(rows):
        assert release.wait(30)
        return model(rows)

    async def score_all():
        made = batcher(compute, executor, tokens_per_batch=200, queue_s=3.0, speed=100.0)
        assert (made.busy_s, made.fill) == (0, 0)
        tasks = [asyncio.create_task(made.score([np.ones(200)])) for _ in range(3)]
        await until(lambda: made.queued_tokens == 400)
        model.now = 5.0
        assert made.busy_s == 5.0 and made.fill == 400 / made.capacity
        release.set()
        await asyncio.gather(*tasks)
        busy = made.busy_s
        assert busy == pytest.approx(5.9) and made.fill == 0
        model.now += 100
        assert made.busy_s == busy

    run(score_all())
