"""Reading a growing log in a thread: order, errors, silence, and Ctrl-C at any moment."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from raybert.jobs.log_stream import read_stream


def stream(*items, then=None):
    async def open_stream():
        for item in items:
            await asyncio.sleep(0)
            yield item
        if then is not None:
            await then()

    return open_stream


def test_chunks_come_in_order_and_none_is_last():
    assert list(read_stream(stream("a", "b\nc"), 10)) == ["a", "b\nc", None]


def test_the_error_of_the_stream_is_raised():
    async def fail():
        raise RuntimeError("cut")

    chunks = read_stream(stream("a", then=fail), 10)
    assert next(chunks) == "a"
    with pytest.raises(RuntimeError, match="^cut$"):
        next(chunks)


def test_a_silent_stream_ends_without_none():
    async def forever():
        await asyncio.Event().wait()

    assert list(read_stream(stream("a", then=forever), 0.1)) == ["a"]


def test_a_stream_that_is_left_closes_its_thread():
    async def forever():
        await asyncio.Event().wait()

    chunks = read_stream(stream("a", then=forever), 10)
    assert next(chunks) == "a"
    chunks.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "job-log"] == []


_FOLLOW = """
import asyncio, signal, sys
from raybert.jobs.log_stream import read_stream

async def lines():
    print("started", flush=True)
    while True:
        await asyncio.sleep(0.0005)
        yield "line\\n"

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    for chunk in read_stream(lines, 10):
        pass
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupt_at_any_moment_is_a_keyboard_interrupt(seed):
    with subprocess.Popen(
        [sys.executable, "-c", _FOLLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(random.Random(seed).random() * 0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
