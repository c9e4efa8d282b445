"""The serial executor: few requests, each keeps its slot, and cancelled ones run no more tasks."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raybert.errors import DataError
from raybert.serve.runtime.batching import ModelFailed, Overloaded
from raybert.serve.runtime.serial_executor import SerialExecutor


@pytest.fixture(scope="module")
def executor():
    with ThreadPoolExecutor(1) as made:
        yield made


def run(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 30)

    return asyncio.run(bounded())


async def work(executor, *tasks):
    with executor.reserve() as slot:
        return [await slot.run(task) for task in tasks]


def test_requests_are_limited_and_exceptions_are_passed_on(executor):
    release = threading.Event()

    def wrong():
        raise DataError("no mask")

    async def ask():
        serial = SerialExecutor(executor, 2)
        tasks = [asyncio.create_task(work(serial, lambda: release.wait(30))) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await work(serial, lambda: None)
        tasks[0].cancel()  # its task still runs and keeps the slot
        await asyncio.gather(tasks[0], return_exceptions=True)
        with pytest.raises(Overloaded):
            await work(serial, lambda: None)
        release.set()
        assert await tasks[1] == [True]
        await asyncio.sleep(0.01)
        with pytest.raises(DataError, match="no mask"):
            await work(serial, wrong)
        with pytest.raises(ModelFailed):
            await work(serial, lambda: 1 / 0)
        assert await work(serial, lambda: 5) == [5]
        assert await work(serial) == []
        await asyncio.sleep(0.01)
        assert serial._count == 0

    run(ask())


def test_a_cancelled_request_runs_no_more_tasks(executor):
    release, done = threading.Event(), []

    def task(number):
        assert release.wait(30)
        done.append(number)

    async def ask():
        serial = SerialExecutor(executor, 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await work(serial, *(lambda n=n: task(n) for n in range(5)))
        release.set()
        await work(serial, lambda: None)
        assert done == [0]

    run(ask())


def test_an_accepted_request_is_not_rejected_between_two_tasks(executor):
    order = []

    async def ask():
        serial = SerialExecutor(executor, 2)

        async def one(name):
            return await work(serial, *(lambda n=n: order.append((name, n)) for n in range(20)))

        tasks = [asyncio.create_task(one(name)) for name in "ab"]
        await asyncio.sleep(0)
        rejections = 0
        while not all(task.done() for task in tasks):
            try:
                await work(serial, lambda: None)
            except Overloaded:
                rejections += 1
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert rejections

    run(ask())
    assert len(order) == 40
    assert [name for name, _ in order] == ["a", "b"] * 20  # their tasks alternate
