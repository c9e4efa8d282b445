"""Work aside: few requests at once, each with its place to the end, nothing for who has left."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raybert.errors import DataError
from raybert.serve.runtime.batching import Failed, Overloaded
from raybert.serve.runtime.serial_executor import SerialExecutor


@pytest.fixture(scope="module")
def executor():
    with ThreadPoolExecutor(1) as made:
        yield made


def run(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 30)

    return asyncio.run(bounded())


async def work(aside, *pieces):
    with aside.turn() as turn:
        return [await turn.run(piece) for piece in pieces]


def test_it_is_bounded_and_tells_what_went_wrong(executor):
    gate = threading.Event()

    def wrong():
        raise DataError("no mask")

    async def ask():
        aside = SerialExecutor(executor, 2)
        tasks = [asyncio.create_task(work(aside, lambda: gate.wait(30))) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await work(aside, lambda: None)
        tasks[0].cancel()  # it runs on, and still counts
        await asyncio.gather(tasks[0], return_exceptions=True)
        with pytest.raises(Overloaded):
            await work(aside, lambda: None)
        gate.set()
        assert await tasks[1] == [True]
        await asyncio.sleep(0.01)
        with pytest.raises(DataError, match="no mask"):
            await work(aside, wrong)
        with pytest.raises(Failed):
            await work(aside, lambda: 1 / 0)
        assert await work(aside, lambda: 5) == [5]
        assert await work(aside) == []
        await asyncio.sleep(0.01)
        assert aside._count == 0

    run(ask())


def test_who_goes_away_leaves_the_pieces_that_have_not_begun(executor):
    gate, done = threading.Event(), []

    def piece(number):
        assert gate.wait(30)
        done.append(number)

    async def ask():
        aside = SerialExecutor(executor, 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await work(aside, *(lambda n=n: piece(n) for n in range(5)))
        gate.set()
        await work(aside, lambda: None)
        assert done == [0]

    run(ask())


def test_who_is_let_in_is_not_refused_between_two_pieces(executor):
    order = []

    async def ask():
        aside = SerialExecutor(executor, 2)

        async def one(name):
            return await work(aside, *(lambda n=n: order.append((name, n)) for n in range(20)))

        tasks = [asyncio.create_task(one(name)) for name in "ab"]
        await asyncio.sleep(0)
        refusals = 0
        while not all(task.done() for task in tasks):
            try:
                await work(aside, lambda: None)
            except Overloaded:
                refusals += 1
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert refusals

    run(ask())
    assert len(order) == 40
    assert [name for name, _ in order] == ["a", "b"] * 20  # one after the other has its turn
