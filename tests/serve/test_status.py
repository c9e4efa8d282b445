"""What the command line logs about the application that it serves, and when it gives up."""

import threading

import pytest

from raybert.errors import RaybertError
from raybert.serve.deploy import status
from raybert.serve.deploy.status import Monitor, State, extract_error, watch


def log_of(*states, **options):
    """Return the lines logged about states that are a second apart."""
    lines = []
    monitor = Monitor(lines.append, **options)
    for second, state in enumerate(states):
        monitor.update(state, float(second))
    return lines


def test_a_healthy_application_is_not_logged():
    assert log_of(*[State(1, "")] * 5, State(3, ""), State(1, "")) == []


def test_each_change_is_logged_once():
    down, one = State(0, "no memory"), State(1, "no memory")
    assert log_of(State(2, ""), one, one, down, down, State(0, ""), State(2, "")) == [
        "unhealthy, 1 replica running: no memory",
        "unhealthy, 0 replicas running: no memory",
        "healthy again, 2 replicas running",
    ]
    assert log_of(State(0, "")) == ["unhealthy, 0 replicas running: no replica runs"]


def test_a_changing_problem_is_logged_once_a_minute():
    states = [State(0, f"try {number}") for number in range(130)]
    assert len(log_of(*states)) == 3


def test_it_gives_up_when_no_replica_has_answered_for_long():
    down = State(0, "m/model.safetensors is damaged")
    with pytest.raises(RaybertError, match="for 10 s: m/model.safetensors is damaged"):
        log_of(*[down] * 11, give_up_s=10)
    back = [*[down] * 10, State(1, ""), *[down] * 10]
    assert len(log_of(*back, give_up_s=10)) == 3
    one_of_two = [State(1, "a replica does not start")] * 100
    assert len(log_of(*one_of_two, give_up_s=10)) == 1  # the other one still answers


def test_a_deleted_application_is_an_error():
    with pytest.raises(RaybertError, match="was deleted"):
        log_of(State(1, ""), None, None, None)
    assert log_of(None, None, State(1, ""), None, None) == []


def test_a_failed_poll_is_logged_and_repeated(monkeypatch):
    """A poll that raises, one that hangs, and one that finds nothing."""
    monkeypatch.setattr(status, "POLL_S", 0)
    monkeypatch.setattr(status, "_POLL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(status, "_LOG_INTERVAL_S", 0)
    release, lines = threading.Event(), []
    polls = [lambda: 1 / 0, lambda: release.wait(30), lambda: State(1, ""), *[lambda: None] * 3]
    with pytest.raises(RaybertError, match="was deleted"):
        watch(lambda: polls.pop(0)(), lines.append)
    release.set()
    assert [line.partition(": ")[2] for line in lines] == [
        "Ray Serve does not answer: ZeroDivisionError",
        "Ray Serve has not answered for 0 s",
        "",
    ]


def test_the_error_of_a_replica_is_extracted_from_its_traceback():
    message = (
        "Deploying application raybert failed: The deployment failed to start 3 times in a row.\n"
        "Traceback (most recent call last):\n  File ...\n"
        "raybert.errors.DamagedError: /m/model.safetensors is damaged: header too large\n"
    )
    assert extract_error(message) == "/m/model.safetensors is damaged: header too large"
    assert extract_error("a\nb\n") == "Ray Serve: b"
    assert extract_error("") == "Ray Serve: no reason given"
