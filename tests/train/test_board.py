"""What driver and workers tell each other, through a real Ray's key-value store."""

import time

import pytest

from raybert.errors import ConfigError
from raybert.train.board import Board, Link

pytestmark = pytest.mark.ray


@pytest.fixture
def board(ray_session):
    board = Board()
    yield board
    board.clear()


def test_records_come_once_in_order_of_attempts_and_steps(board):
    for place in [(2, 0), (1, 10), (1, 2), (10, 0)]:
        board.put({"place": list(place)}, place)
    assert [tuple(r["place"]) for r in board.take()] == [(1, 2), (1, 10), (2, 0), (10, 0)]
    assert board.take() == []


def test_the_first_error_stays_and_ends_the_run(board):
    assert board.error() is None and not board.is_over()
    board.fail(ConfigError("the first"))
    board.fail(ConfigError("the second"))
    error = board.error()
    assert isinstance(error, ConfigError) and str(error) == "the first"
    assert board.is_over() and not board.is_stopping()


def test_boards_know_nothing_of_each_other_and_leave_nothing_behind(board):
    from ray.experimental import internal_kv as kv

    other = Board()
    other.stop()
    other.put({}, (1, 0))
    assert other.is_over() and not board.is_over() and board.take() == []
    other.clear()
    assert not other.is_over()
    assert kv._internal_kv_list(other._prefix, namespace=b"raybert") == []


def test_a_link_sends_all_that_was_reported_before_it_closes(board):
    link = Link(board, attempt=3)
    for step in range(50):
        link.report({"step": step})
    link.close()
    assert [record["step"] for record in board.take()] == list(range(50))


def test_a_link_hears_of_the_wish_to_stop(board):
    link = Link(board, attempt=1)
    try:
        assert not link.is_stopping()
        board.stop()
        deadline = time.monotonic() + 20
        while not link.is_stopping() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert link.is_stopping()
    finally:
        link.close()


def test_a_board_travels_to_a_task(ray_session, board):
    ray_session.get(ray_session.remote(Board.put).remote(board, {"from": "a task"}, (1, 0)))
    assert board.take() == [{"from": "a task"}]
