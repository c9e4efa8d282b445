"""When a lost worker is replaced, when a run gives up, and what its user is told."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError
from ray.train import FailureConfig, PreemptionError, PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError

from raybert.cluster.session import Resources
from raybert.storage.folder import Folder
from raybert.train.distributed import _interface_of
from raybert.train.ray.driver_channel import DriverChannel
from raybert.train.ray.recovery import (
    FailureContext,
    NoProgressFailurePolicy,
    RestartingTrainer,
    answers_still,
    causes_of,
    reason_of,
)
from raybert.train.task import Preempted

LOST = WorkerGroupError("lost", {1: RuntimeError("Connection closed by peer"), 2: RayActorError()})
NO_PLACE = ControllerError(WorkerGroupStartupTimeoutError(3))
EVICTED = WorkerGroupError("left", {0: Preempted("a node goes away at step 7")})
TAKEN = PreemptionError(PreemptionInfo(None, {"a": [1]}))


class Losses:
    """A run whose checkpoints come as a test wants."""

    def __init__(self):
        self.step, self.told = 0, []

    def last_step(self):
        return self.step

    def tell(self, event, message):
        self.told.append(message)


def decide(patience, error):
    return patience.make_decision(error) == FailureDecision.RETRY


@given(most=st.integers(0, 5), steps=st.lists(st.integers(0, 1), max_size=30))
def test_only_restarts_that_came_no_further_count(most, steps):
    """A run gives up exactly where more than `max_failures` in a row had no new checkpoint."""
    losses = Losses()
    patience = NoProgressFailurePolicy(FailureConfig(max_failures=most), losses)
    in_a_row = 0
    for progress in steps:
        losses.step += progress
        in_a_row = 1 if progress else in_a_row + 1
        assert decide(patience, LOST) == (in_a_row <= most)
        if in_a_row > most:
            return


def test_a_run_that_stands_still_says_how_often_it_tried():
    losses = Losses()
    patience = NoProgressFailurePolicy(FailureConfig(max_failures=3), losses)
    for _ in range(2):
        decide(patience, LOST)
    losses.step = 5
    decide(patience, LOST)
    assert losses.told == [
        "a worker was lost: starting again from step 0",
        "a worker was lost: starting again from step 0, for the 2nd time of at most 3",
        "a worker was lost: starting again from step 5",
    ]


@pytest.mark.parametrize("error", [NO_PLACE, EVICTED, TAKEN])
def test_nodes_that_go_or_do_not_come_are_waited_for(error):
    patience = NoProgressFailurePolicy(FailureConfig(max_failures=0), Losses())
    assert all(decide(patience, error) for _ in range(20))
    assert not decide(patience, LOST)


def test_what_fails_while_workers_start_is_tried_again():
    losses = Losses()
    patience = NoProgressFailurePolicy(FailureConfig(max_failures=1), losses)
    assert decide(patience, ControllerError(RayActorError()))
    assert losses.told == ["a worker was lost: starting again from step 0"]
    assert not decide(patience, ControllerError(RayActorError()))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LOST, "a worker was lost"),
        (NO_PLACE, "not all workers found a place in time"),
        (EVICTED, "a node goes away at step 7"),
        (TAKEN, "a node is taken away"),
        (WorkerGroupError("", {0: ValueError("first\nlast line")}), "last line"),
        (
            WorkerGroupError("", {3: RuntimeError("[gloo/pair.cc] reset")}),
            "a worker does not answer",
        ),
        (WorkerGroupError("", {0: WorkerHealthCheckTimeoutError("")}), "a worker does not answer"),
        (
            WorkerGroupError("", {0: WorkerHealthCheckFailedError("", RayActorError())}),
            "a worker was lost",
        ),
        (WorkerGroupError("", {3: RuntimeError("of its own")}), "of its own"),
        (WorkerGroupError("", {0: ValueError()}), "ValueError"),
    ],
)
def test_the_reason_is_what_matters_to_the_user(error, reason):
    assert reason_of(error) == reason


def test_causes_come_in_the_order_of_ranks():
    first, second = ValueError("a"), ValueError("b")
    assert causes_of(WorkerGroupError("", {5: second, 0: first})) == [first, second]


def test_the_last_step_is_that_of_the_storage_or_the_last_known_one(tmp_path):
    run = Folder(tmp_path)
    losses = FailureContext(run, DriverChannel())
    assert losses.last_step() == 0
    (run / "checkpoints").write_json("step-00000012.json", {})
    assert losses.last_step() == 12
    losses.tell("restart", "no head is there to be told")  # nothing happens


@pytest.mark.parametrize("started_here", [True, False])
def test_helpers_without_a_use_are_left_out(tmp_path, started_here):
    from ray.train.torch import TorchTrainer

    def names(trainer):
        return {type(callback).__name__ for callback in trainer._create_default_callbacks()}

    def ours():
        resources = Resources(4, 0, 1 << 30, started_here)
        return RestartingTrainer(
            lambda: None, run=Folder(tmp_path), board=DriverChannel(), resources=resources
        )

    usual, left = names(TorchTrainer(lambda: None)), names(ours())
    cleaner = {"PlacementGroupCleanerCallback"} if started_here else set()
    assert usual - left == {"DatasetsCallback"} | cleaner
    assert not left - usual


def test_the_interface_of_an_address():
    names = {name for _, name in socket.if_nameindex()}
    assert _interface_of("127.0.0.1") in names
    assert _interface_of("203.0.113.7") is None


def test_a_node_that_takes_no_connection_is_gone():
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        host, port = raylet.getsockname()
        node = {"NodeManagerAddress": host, "NodeManagerPort": port}
        assert answers_still(node)
    assert not answers_still(node)
