"""Messages between the driver and the workers, through a real Ray's key-value store."""

import json
import pickle
import signal
import threading
import time

import pytest

from raybert.cluster.internals import core
from raybert.errors import ConfigError
from raybert.train.ray import driver_channel as module
from raybert.train.ray.driver import _fit
from raybert.train.ray.driver_channel import DriverChannel, WorkerChannel, run_fit


@pytest.fixture
def channel(ray_session):
    channel = DriverChannel()
    yield channel
    channel.clear()


@pytest.mark.ray
def test_records_are_received_once_in_the_order_of_attempts_and_numbers(channel):
    for position in [(2, 0), (1, 10), (1, 2), (10, 0)]:
        channel.send(json.dumps({"position": position}), position)
    assert [tuple(r["position"]) for r in channel.receive()] == [(1, 2), (1, 10), (2, 0), (10, 0)]
    assert list(channel.receive()) == []


@pytest.mark.ray
def test_events_are_no_progress(channel):
    channel.send_event("waiting", "for nodes", 0)
    assert len(list(channel.receive())) == 1 and not channel.has_progress
    channel.send('{"kind": "train", "step": 1}', (1, 0))
    assert len(list(channel.receive())) == 1 and channel.has_progress


@pytest.mark.ray
def test_the_first_fatal_error_is_kept(channel):
    assert channel.error() is None and not channel.is_over()
    channel.fail(ConfigError("the first"))
    channel.fail(ConfigError("the second"))
    error = channel.error()
    assert isinstance(error, ConfigError) and str(error) == "the first"
    assert channel.is_over() and not channel.is_stopping()


@pytest.mark.ray
def test_channels_are_separate_and_leave_no_keys_behind(channel):
    other = DriverChannel()
    other.stop()
    other.send("{}", (1, 0))
    assert other.is_over() and not channel.is_over() and not list(channel.receive())
    other.clear()
    assert not other.is_over()
    assert core.kv_list(other._prefix) == []


@pytest.mark.ray
def test_all_records_are_sent_before_a_worker_channel_closes(channel):
    worker = WorkerChannel(channel, attempt=3)
    for step in range(50):
        worker.report({"step": step})
    worker.close()
    assert [record["step"] for record in channel.receive()] == list(range(50))


@pytest.mark.ray
def test_a_worker_sees_the_request_to_stop(channel):
    worker = WorkerChannel(channel, attempt=1)
    try:
        assert not worker.is_stopping()
        channel.stop()
        deadline = time.monotonic() + 20
        while not worker.is_stopping() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert worker.is_stopping()
    finally:
        worker.close()


@pytest.mark.ray
def test_a_channel_can_be_sent_to_a_task(ray_session, channel):
    ray_session.get(
        ray_session.remote(DriverChannel.send).remote(channel, '{"from": "a task"}', (1, 0))
    )
    assert list(channel.receive()) == [{"from": "a task"}]


@pytest.mark.ray
def test_the_running_attempt_is_known_wherever_the_channel_is_sent(channel):
    assert channel.attempt() == 0
    channel.begin(3)
    assert pickle.loads(pickle.dumps(channel)).attempt() == 3


class Store(DriverChannel):
    """A channel in this process, whose head fails or hangs for a while."""

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

    def receive(self):
        for name in sorted(n for n in self.kept if n.startswith("record/")):
            yield json.loads(self.kept.pop(name))

    def clear(self):
        self.kept.clear()


def test_no_record_is_lost_while_the_head_does_not_answer(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    store = Store(failures=4)
    worker = WorkerChannel(store, attempt=1)
    for step in range(3):
        worker.report({"step": step})
    worker.close()
    assert [record["step"] for record in store.receive()] == [0, 1, 2]


def test_a_head_that_hangs_does_not_block_close(monkeypatch):
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.1)
    store = Store(hangs=True)
    worker = WorkerChannel(store, attempt=1)
    worker.report({"step": 1})
    worker.close()  # returns
    store.answered.set()


class Trainer:
    """Trains until a test ends it."""

    def __init__(self):
        self.may_end = threading.Event()

    def fit(self):
        self.may_end.wait()


def test_a_fatal_error_is_raised_after_the_records_before_it_and_kept_for_restarts():
    store, trainer, shown = Store(), Trainer(), []
    store.send('{"step": 7}', (1, 0))
    store.fail(ConfigError("lower the lr"))
    with pytest.raises(ConfigError, match="lower the lr"):
        _fit(trainer.fit, store, shown.append)
    assert shown == [{"step": 7}]
    assert store.is_over()  # workers that start now must return at once
    trainer.may_end.set()


def test_a_finished_run_clears_its_channel():
    store, trainer, shown = Store(), Trainer(), []
    trainer.may_end.set()
    store.send('{"step": 7}', (1, 0))
    _fit(trainer.fit, store, shown.append)
    assert shown == [{"step": 7}]
    assert store.kept == {}


def interrupt(trainer, store, when):
    """Run `fit`, press Ctrl-C at a poll, and return at which polls the workers were to stop."""
    polls = []

    def poll():
        polls.append(store.is_stopping())
        list(store.receive())
        if len(polls) == when:
            signal.raise_signal(signal.SIGINT)
        if len(polls) == when + 3:
            trainer.may_end.set()  # its checkpoint took a while

    with pytest.raises(KeyboardInterrupt):
        run_fit(trainer.fit, store, poll)
    return polls


def test_ctrl_c_waits_for_the_checkpoint_of_workers_that_train(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    store, trainer = Store(), Trainer()
    store.has_progress = True
    assert interrupt(trainer, store, when=2) == [False, False, True, True, True]
    assert trainer.may_end.is_set() and store.kept == {}


def test_ctrl_c_before_the_first_step_waits_for_no_worker(monkeypatch):
    """A worker that starts later finds the stop."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "_START_SECONDS", 0.05)
    store, trainer = Store(), Trainer()
    assert interrupt(trainer, store, when=2) == [False, False]
    assert not trainer.may_end.is_set() and store.is_over()
    trainer.may_end.set()


def test_a_save_request_is_seen_once_and_again_when_repeated(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    store = Store()
    worker = WorkerChannel(store, attempt=1)

    def is_requested():
        ends = time.monotonic() + 20
        while not (requested := worker.is_save_requested()) and time.monotonic() < ends:
            time.sleep(0.01)
        return requested

    try:
        assert not worker.is_save_requested()
        for _ in range(2):
            store.request_save()
            assert is_requested()
            time.sleep(0.1)
            assert not worker.is_save_requested()
    finally:
        worker.close()


def test_events_at_one_moment_are_all_received_in_their_order(monkeypatch):
    store = Store()
    monkeypatch.setattr(module.time, "time", lambda: 1000.0)
    for number in range(20):
        store.send_event("restart", f"event {number}", 8)
    assert [record["message"] for record in store.receive()] == [f"event {n}" for n in range(20)]


def test_an_event_is_ordered_after_its_attempts_records():
    store = Store()
    store.begin(2)
    store.send('{"step": 9}', (2, 40))
    store.send('{"step": 8}', (3, 0))
    store.send_event("restart", "a worker was lost", 8)
    kept = list(store.receive())
    assert [record["step"] for record in kept] == [9, 8, 8]
    assert kept[1] == {
        "kind": "event",
        "step": 8,
        "event": "restart",
        "message": "a worker was lost",
    }
