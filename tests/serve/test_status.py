"""What the command line tells of an application that it serves, and when it gives up."""

import threading

import pytest

from raybert.errors import RaybertError
from raybert.serve.deploy import status
from raybert.serve.deploy.status import State, Watch, reason, watch


def told_of(*states, **options):
    """The lines of states that come a second after each other."""
    lines = []
    seen = Watch(lines.append, **options)
    for second, state in enumerate(states):
        seen.note(state, float(second))
    return lines


def test_nothing_is_told_of_an_application_that_is_well():
    assert told_of(*[State(1, "")] * 5, State(3, ""), State(1, "")) == []


def test_changes_are_told_once():
    down, one = State(0, "no memory"), State(1, "no memory")
    assert told_of(State(2, ""), one, one, down, down, State(0, ""), State(2, "")) == [
        "in trouble, 1 replica answers: no memory",
        "in trouble, 0 replicas answer: no memory",
        "well again, 2 replicas answer",
    ]
    assert told_of(State(0, "")) == ["in trouble, 0 replicas answer: no replica runs"]


def test_another_reason_is_told_but_not_every_second():
    states = [State(0, f"try {number}") for number in range(130)]
    assert len(told_of(*states)) == 3


def test_it_is_given_up_when_no_replica_has_answered_for_long():
    down = State(0, "m/model.safetensors is damaged")
    with pytest.raises(RaybertError, match="for 10 s: m/model.safetensors is damaged"):
        told_of(*[down] * 11, give_up_s=10)
    back = [*[down] * 10, State(1, ""), *[down] * 10]
    assert len(told_of(*back, give_up_s=10)) == 3
    one_of_two = [State(1, "a replica does not start")] * 100
    assert len(told_of(*one_of_two, give_up_s=10)) == 1  # the other one answers on


def test_an_application_that_was_taken_away_is_no_more():
    with pytest.raises(RaybertError, match="was taken away"):
        told_of(State(1, ""), None, None, None)
    assert told_of(None, None, State(1, ""), None, None) == []


def test_who_does_not_answer_is_told_and_asked_again(monkeypatch):
    """A look that fails, one that hangs, and one that finds nothing."""
    monkeypatch.setattr(status, "LOOK_S", 0)
    monkeypatch.setattr(status, "_SILENT_S", 0.05)
    monkeypatch.setattr(status, "_AGAIN_S", 0)
    gate, lines = threading.Event(), []
    looks = [lambda: 1 / 0, lambda: gate.wait(30), lambda: State(1, ""), *[lambda: None] * 3]
    with pytest.raises(RaybertError, match="was taken away"):
        watch(lambda: looks.pop(0)(), lines.append)
    gate.set()
    assert [line.partition(": ")[2] for line in lines] == [
        "Ray Serve does not answer: ZeroDivisionError",
        "Ray Serve has not answered for 0 s",
        "",
    ]


def test_the_reason_of_a_replica_is_told_without_its_traceback():
    message = (
        "Deploying application raybert failed: The deployment failed to start 3 times in a row.\n"
        "Traceback (most recent call last):\n  File ...\n"
        "raybert.errors.DamagedError: /m/model.safetensors is damaged: header too large\n"
    )
    assert reason(message) == "/m/model.safetensors is damaged: header too large"
    assert reason("a\nb\n") == "Ray Serve: b"
    assert reason("") == "Ray Serve: no reason given"
