"""Retries: what a storage refuses for a while is tried again, within a limit."""

import time

import pytest

from raybert.errors import DamagedError, StorageError
from raybert.storage import retry as module
from raybert.storage.retry import retry


class Fails:
    """Fails a number of times, then returns."""

    def __init__(self, times, error=StorageError):
        self.left, self.error = times, error

    def __call__(self):
        self.left -= 1
        if self.left >= 0:
            raise self.error("writing a failed: No space left on device")
        return "answer"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.001)


def test_a_failure_that_passes_is_retried_and_reported_once(quick):
    messages = []
    assert retry(Fails(4), 60, messages.append) == "answer"
    assert messages == ["writing a failed: No space left on device; retrying for up to 60 s"]


def test_retries_end(quick):
    action = Fails(10**6)
    with pytest.raises(StorageError, match="No space left"):
        retry(action, 0.02)
    assert 10**6 - action.left > 2


def test_the_limit_holds_for_a_try_as_long_as_the_last_one(quick, monkeypatch):
    """Other ranks wait for this one, and take it for lost after a time of theirs."""
    clock = [0.0]
    monkeypatch.setattr("raybert.storage.retry.time.monotonic", lambda: clock[0])

    def silent():
        clock[0] += 40
        raise StorageError("no answer")

    with pytest.raises(StorageError):
        retry(silent, 100)
    assert clock[0] == 80


def test_a_limit_of_zero_is_one_try():
    action = Fails(1)
    with pytest.raises(StorageError):
        retry(action, 0)
    assert action.left == 0


def test_other_errors_are_not_retried():
    action = Fails(2, DamagedError)
    with pytest.raises(DamagedError):
        retry(action, 60)
    assert action.left == 1


def test_a_store_that_is_busy_for_a_moment_is_retried(proxy, monkeypatch):
    through, connection = proxy
    connection.refuse()
    sleep = time.sleep

    def meanwhile(seconds):
        connection.mend()
        sleep(0.01)

    monkeypatch.setattr("raybert.storage.retry.time.sleep", meanwhile)
    messages = []
    retry(lambda: through.write_text("a", "x"), 60, messages.append)
    assert through.read_text("a") == "x"
    assert len(messages) == 1
    assert messages[0].startswith("writing ") and messages[0].endswith("; retrying for up to 60 s")
