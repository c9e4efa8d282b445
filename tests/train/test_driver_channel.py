"""What driver and workers tell each other, through a real Ray's key-value store."""

import json
import pickle
import threading
import time

import pytest

from raybert.errors import ConfigError, StorageError
from raybert.train.ray import driver_channel as module
from raybert.train.ray.driver_channel import DriverChannel, WorkerChannel
from raybert.train.ray.worker import _fit, _said_by_worker


@pytest.fixture
def board(ray_session):
    board = DriverChannel()
    yield board
    board.clear()


@pytest.mark.ray
def test_records_come_once_in_order_of_attempts_and_steps(board):
    for place in [(2, 0), (1, 10), (1, 2), (10, 0)]:
        board.put(json.dumps({"place": list(place)}), place)
    assert [tuple(r["place"]) for r in board.take()] == [(1, 2), (1, 10), (2, 0), (10, 0)]
    assert list(board.take()) == []


@pytest.mark.ray
def test_the_first_error_stays_and_ends_the_run(board):
    assert board.error() is None and not board.is_over()
    board.fail(ConfigError("the first"))
    board.fail(ConfigError("the second"))
    error = board.error()
    assert isinstance(error, ConfigError) and str(error) == "the first"
    assert board.is_over() and not board.is_stopping()


@pytest.mark.ray
def test_boards_know_nothing_of_each_other_and_leave_nothing_behind(board):
    from ray.experimental import internal_kv as kv

    other = DriverChannel()
    other.stop()
    other.put("{}", (1, 0))
    assert other.is_over() and not board.is_over() and not list(board.take())
    other.clear()
    assert not other.is_over()
    assert kv._internal_kv_list(other._prefix, namespace=b"raybert") == []


@pytest.mark.ray
def test_a_link_sends_all_that_was_reported_before_it_closes(board):
    link = WorkerChannel(board, attempt=3)
    for step in range(50):
        link.report({"step": step})
    link.close()
    assert [record["step"] for record in board.take()] == list(range(50))


@pytest.mark.ray
def test_a_link_hears_of_the_wish_to_stop(board):
    link = WorkerChannel(board, attempt=1)
    try:
        assert not link.is_stopping()
        board.stop()
        deadline = time.monotonic() + 20
        while not link.is_stopping() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert link.is_stopping()
    finally:
        link.close()


@pytest.mark.ray
def test_a_board_travels_to_a_task(ray_session, board):
    ray_session.get(
        ray_session.remote(DriverChannel.put).remote(board, '{"from": "a task"}', (1, 0))
    )
    assert list(board.take()) == [{"from": "a task"}]


@pytest.mark.ray
def test_an_attempt_knows_whether_a_younger_one_is_at_work(board):
    assert board.attempt() == 0
    board.begin(3)
    assert pickle.loads(pickle.dumps(board)).attempt() == 3


class Store(DriverChannel):
    """A board in this process, whose head is away for a while."""

    def __init__(self, failures=0, hangs=False):
        super().__init__()
        self.kept, self.failures, self.hangs = {}, failures, hangs
        self.answered = threading.Event()

    def _put(self, name, value, overwrite=True):
        if self.hangs:
            self.answered.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no head")
        if overwrite or name not in self.kept:
            self.kept[name] = value

    def _get(self, name):
        return self.kept.get(name)

    def take(self):
        for name in sorted(n for n in self.kept if n.startswith("record/")):
            yield json.loads(self.kept.pop(name))

    def clear(self):
        self.kept.clear()


def test_nothing_is_lost_while_the_head_is_away(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.01)
    store = Store(failures=4)
    link = WorkerChannel(store, attempt=1)
    for step in range(3):
        link.report({"step": step})
    link.close()
    assert [record["step"] for record in store.take()] == [0, 1, 2]


def test_a_head_that_hangs_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.1)
    store = Store(hangs=True)
    link = WorkerChannel(store, attempt=1)
    link.report({"step": 1})
    link.close()  # would wait for ever
    store.answered.set()


class Trainer:
    """Trains until it is told that it may end."""

    def __init__(self):
        self.may_end = threading.Event()

    def fit(self):
        self.may_end.wait()


def test_an_error_is_shown_after_what_came_before_it_and_stays_for_restarts():
    store, trainer, shown = Store(), Trainer(), []
    store.put('{"step": 7}', (1, 0))
    store.fail(ConfigError("lower the lr"))
    with pytest.raises(ConfigError, match="lower the lr"):
        _fit(trainer.fit, store, shown.append)
    assert shown == [{"step": 7}]
    assert store.is_over()  # a worker group that starts now must end in peace
    trainer.may_end.set()


def test_a_run_that_ends_leaves_nothing_on_the_board():
    store, trainer, shown = Store(), Trainer(), []
    trainer.may_end.set()
    store.put('{"step": 7}', (1, 0))
    _fit(trainer.fit, store, shown.append)
    assert shown == [{"step": 7}]
    assert store.kept == {}


def test_what_a_user_can_mend_is_said_by_its_own_class():
    class Failed(Exception):
        def __init__(self, cause):
            self.worker_failures = {0: cause}

    full = StorageError("writing x failed: No space left on device")
    assert _said_by_worker(Failed(full)) is full
    other = _said_by_worker(Failed(ValueError("odd")))
    assert str(other) == "training failed: odd"


def test_a_wish_to_save_is_heard_once_and_again_when_it_is_repeated(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.01)
    store = Store()
    link = WorkerChannel(store, attempt=1)

    def heard():
        ends = time.monotonic() + 20
        while not (asked := link.is_asked_to_save()) and time.monotonic() < ends:
            time.sleep(0.01)
        return asked

    try:
        assert not link.is_asked_to_save()
        for _ in range(2):
            store.ask_to_save()
            assert heard()
            time.sleep(0.1)
            assert not link.is_asked_to_save()
    finally:
        link.close()


def test_an_event_comes_after_the_records_of_its_attempt_and_before_the_next_ones():
    store = Store()
    store.begin(2)
    store.put('{"step": 9}', (2, 40))
    store.put('{"step": 8}', (3, 0))
    store.tell("restart", "a worker was lost", 8)
    kept = list(store.take())
    assert [record["step"] for record in kept] == [9, 8, 8]
    assert kept[1] == {
        "kind": "event",
        "step": 8,
        "event": "restart",
        "message": "a worker was lost",
    }
