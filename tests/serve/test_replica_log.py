"""A replica's log is flushed regularly, though Serve buffers a thousand lines in memory."""

import asyncio
import logging
import logging.handlers

import pytest

from raybert.serve.http import api


@pytest.fixture
def log(tmp_path):
    """A log as Serve makes it for a replica."""
    file = logging.FileHandler(tmp_path / "log")
    buffer = logging.handlers.MemoryHandler(1000, target=file)
    made = logging.Logger("raybert.test.logs")
    made.addHandler(buffer)
    yield made
    buffer.close()
    file.close()


def test_lines_are_written_regularly_and_at_the_end(log, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "FLUSH_INTERVAL_S", 0.01)

    def lines():
        return (tmp_path / "log").read_text().splitlines()

    async def serve():
        task = asyncio.create_task(api.flush_regularly(log))
        log.info("one")
        assert lines() == []
        async with asyncio.timeout(30):
            while not lines():
                await asyncio.sleep(0.01)
        monkeypatch.setattr(api, "FLUSH_INTERVAL_S", 60)
        await asyncio.sleep(0.05)
        log.info("two")
        task.cancel()

    asyncio.run(serve())
    assert lines() == ["one", "two"]
